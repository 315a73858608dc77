import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

// The previews of a clip are moving pictures (APNG), whichever sampler makes it. The classic canvas draws the first frame of one, unless
// the node's output is said to move: then it shows an <img>, which plays it. So we say so, until it is drawn. Nodes 2.0 shows an <img> anyway.
const MOVES = { images: [{ filename: "preview.png" }], animated: [true] };
const HEIGHT = 220; // that a node grows by for its first preview, as the canvas has it for a still one

async function moves(blob) {
  const start = await blob.slice(0, 64).text(); // the chunk that makes a PNG an animated one stands in front
  return start.includes("acTL");
}

app.registerExtension({
  name: "AVDM2.MovingPreviews",
  setup() {
    api.addEventListener("b_preview_with_metadata", async ({ detail }) => {
      const id = detail.displayNodeId;
      const node = app.graph.getNodeById(id);
      if (!node || LiteGraph.vueNodesMode || !(await moves(detail.blob))) return;
      if (!node.imgs?.length && !app.nodeOutputs[id]) {
        const [width, height] = node.computeSize();
        node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height + HEIGHT)]);
      }
      app.nodeOutputs[id] = MOVES;
      clearTimeout(node.avdm2Moves);
      node.avdm2Moves = setTimeout(() => delete app.nodeOutputs[id], 2000);
    });
  },
});
