import copy
import hashlib

import torch
from diffusers import UNet2DConditionModel

from avdm2_nodes.files.hashes import weights_hash

torch.set_num_threads(1)


def test_weights_hash_is_of_the_weights_alone(base, tmp_path):
    rounded = copy.deepcopy(base).half()
    assert weights_hash(rounded) == weights_hash(copy.deepcopy(rounded).float()) == weights_hash(base)
    rounded.save_pretrained(tmp_path)
    assert weights_hash(UNet2DConditionModel.from_pretrained(tmp_path)) == weights_hash(base)
    assert weights_hash(copy.deepcopy(base).to(memory_format=torch.channels_last)) == weights_hash(base)
    changed = copy.deepcopy(base)
    changed.conv_out.bias.data[0] += 1e-2
    assert weights_hash(changed) != weights_hash(base)


def test_weights_hash_stays_what_it_was():
    module = torch.nn.Linear(2, 1)
    module.load_state_dict({"weight": torch.tensor([[0.5, -2.0]]), "bias": torch.tensor([1.0])})
    told = b"bias [1]\n\x00\x3cweight [1, 2]\n\x00\x38\x00\xc0"
    assert weights_hash(module) == hashlib.sha256(told).hexdigest()
