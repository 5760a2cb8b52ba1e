"""VeRA: the matrices that all layers share."""

import torch
from safetensors.torch import load_file
from torch import nn

import lorakit as lk
from lorakit.adapters.manage import attached
from tests.adapters.methods.common import shaken


def two_sizes():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 9))


def test_layers_share_two_matrices_as_large_as_the_largest():
    module = lk.attach(two_sizes(), lk.VeraConfig(target_modules=["0", "1"], r=3))
    first, second = (wrapper.part for wrapper in attached(module).values())
    assert first.shared is second.shared
    assert first.shared.A.shape == (3, 6)
    assert first.shared.B.shape == (9, 3)
    shaken(module)
    A, B = second.pair()
    assert torch.equal(A, second.shared.A[:, :4] * second.lambda_d[:, None])
    assert torch.equal(B, second.shared.B * second.lambda_b[:, None])


def test_the_file_holds_the_matrices_or_leaves_them_to_the_seed(tmp_path):
    shared = {"base_model.vera_A", "base_model.vera_B"}
    x = torch.randn(2, 6)
    for saved in (True, False):
        options = {"r": 3, "save_projection": saved, "projection_prng_key": 7}
        module = shaken(lk.attach(two_sizes(), lk.VeraConfig(target_modules=["0", "1"], **options)))
        lk.save_adapter(module, tmp_path / str(saved))
        keys = load_file(tmp_path / str(saved) / "adapter_model.safetensors").keys()
        assert keys & shared == (shared if saved else set())
        again = lk.load_adapter(two_sizes(), tmp_path / str(saved))
        assert torch.equal(again(x), module(x))
