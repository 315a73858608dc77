import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

// What our nodes have to tell of a graph that runs all the same stands on the node, in ComfyUI's text box of two lines. It grows to its text.
const OURS = "AVDM2: ";
const LETTER = 6.5; // pixels that a letter is wide
const LINE = 17;

app.registerExtension({
  name: "AVDM2.ReadableWarnings",
  setup() {
    api.addEventListener("progress_text", ({ detail }) => {
      if (!detail.text?.startsWith(OURS)) return;
      setTimeout(() => {
        const node = app.graph.getNodeById(detail.nodeId);
        const box = node?.widgets?.find((widget) => widget.name === "$$node-text-preview");
        if (!box) return;
        const letters = Math.max(1, Math.floor((node.size[0] - 40) / LETTER));
        const lines = detail.text.split("\n").reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / letters)), 0);
        box.options.getMinHeight = () => 16 + LINE * lines;
        const [width, height] = node.computeSize();
        node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
      });
    });
  },
});
