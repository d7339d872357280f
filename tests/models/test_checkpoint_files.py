"""A file is read whole or refused with what it is; nothing that it names is opened, nothing in it is run."""

import json
import os
import pickle
import random
import struct
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

pytest.importorskip("timm")
import timm

from mimkernels.models import MAE
from mimkernels.models.checkpoint import read_weights

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
DECODER = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 4}


def build(name="vit_tiny_patch16_224", **changes):
    return MAE.from_timm(name, **{**SMALL, **DECODER, **changes})


class Ran(Exception):
    pass


class Dangerous:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return (os.mkdir, (self.mark,))


def no_timm_reads(monkeypatch):
    """Whatever timm would open or fetch ends the test."""

    def refuse(*args, **options):
        raise Ran(f"opened {args} {options}")

    for where in ("_helpers.load_state_dict", "_hub.load_state_dict_from_hf", "_hub.load_state_dict_from_path"):
        monkeypatch.setattr(f"timm.models.{where}", refuse)
    for where in ("load_state_dict", "load_state_dict_from_hf", "load_custom_pretrained", "load_pretrained"):
        monkeypatch.setattr(f"timm.models._builder.{where}", refuse)
    for where in ("load_checkpoint", "load_model_config_from_hf", "load_model_config_from_path"):
        monkeypatch.setattr(f"timm.models._factory.{where}", refuse)


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint_path": "evil.pth"},
        {"pretrained": True},
        {"pretrained": True, "pretrained_cfg": {"file": "evil.pth"}},
        {"pretrained_cfg": {"file": "evil.pth"}},
        {"pretrained_cfg_overlay": {"file": "evil.pth"}},
        {"cache_dir": "elsewhere"},
        {"features_only": True},
        {"norm_layer": "torch.nn.LayerNorm"},
        {"act_layer": "../gelu"},
        {"block_fn": "Block"},
        {"attn_layer": "Attention"},
        {"depth": {"file": "evil.pth"}},
        {"patch_size": [[4, 4]]},
        {"timm_kwargs": {"checkpoint_path": "evil.pth"}},
        {"name": "hf-hub:someone/model"},
        {"name": "local-dir:evil"},
        {"name": "evil/model"},
    ],
    ids=str,
)
def test_a_saved_configuration_says_nothing_but_the_architecture(change, monkeypatch):
    config = build().config
    no_timm_reads(monkeypatch)
    refused = "|".join([*change, str(change.get("name"))])
    with pytest.raises(ValueError, match=rf"model (argument )?'({refused})'"):
        MAE.from_config({**config, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 10**9}, "'depth' must be a whole number up to 1,024, got 1000000000"),
        ({"depth": "2"}, "'depth' must be a whole number up to 1,024, got '2'"),
        ({"depth": 2.0}, "'depth' must be a whole number"),
        ({"embed_dim": True}, "'embed_dim' must be a whole number"),
        ({"decoder_depth": 10**9}, "'decoder_depth' must be a whole number"),
        ({"img_size": [32, -1]}, r"'img_size' must be a whole number up to 65,536, got \[32, -1\]"),
        ({"embed_dim": 65_536, "depth": 1_000}, "embed_dim 65,536 and depth 1,000 make about"),
    ],
    ids=str,
)
def test_sizes_of_a_saved_configuration_are_those_of_models(change, message, monkeypatch):
    config = build().config
    no_timm_reads(monkeypatch)
    with pytest.raises(ValueError, match=message):
        MAE.from_config({**config, **change})


def test_a_saved_configuration_may_say_all_of_the_architecture():
    own = {
        "qk_norm": True, "init_values": 0.1, "class_token": False, "reg_tokens": 2, "drop_path_rate": 0.1,
        "fc_norm": None, "mlp_ratio": 2.0, "act_layer": "gelu_tanh", "norm_layer": "layernorm", "patch_size": [8, 8],
        "img_size": [32, 16],
    }  # fmt: skip
    config = json.loads(json.dumps(build(**own).config))
    assert MAE.from_config(config).state_dict().keys() == build(**own).state_dict().keys()


def test_where_weights_came_from_is_no_part_of_the_configuration(tmp_path):
    model = build()
    torch.save(model.encoder.state_dict(), tmp_path / "encoder.pth")
    loaded = build(checkpoint_path=str(tmp_path / "encoder.pth"))
    assert torch.equal(loaded.encoder.cls_token, model.encoder.cls_token)
    assert loaded.config.keys() == model.config.keys()
    MAE.from_config(loaded.config)


def test_no_supported_timm_unpickles_code(tmp_path):
    settings = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    wanted = next(
        r for r in map(Requirement, settings["project"]["optional-dependencies"]["train"]) if r.name == "timm"
    )
    assert not wanted.specifier.contains("1.0.25") and wanted.specifier.contains(timm.__version__)
    with open(tmp_path / "evil.pth", "wb") as file:
        pickle.dump({"model": Dangerous(tmp_path / "ran")}, file)
    with pytest.raises(Exception, match="weights_only"):
        timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(tmp_path / "evil.pth"))
    assert not (tmp_path / "ran").exists()


def weights():
    generator = torch.Generator().manual_seed(0)
    return {f"blocks.{i}.weight": torch.randn(40, 50, generator=generator) for i in range(3)}


def test_no_changed_bit_is_read_silently(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"model": weights()}, path)
    whole = path.read_bytes()
    rng = random.Random(0)
    directory = whole.index(b"PK\x01\x02")
    places = [rng.randrange(len(whole)) for _ in range(150)] + [
        rng.randrange(directory, len(whole)) for _ in range(150)
    ]
    refused = 0
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        try:
            read = read_weights(path)
        except ValueError as e:
            refused += "weights.pth' cannot be read: it is damaged" in str(e)
        else:  # between the records, or what nobody reads
            assert all(torch.equal(read[name], tensor) for name, tensor in weights().items())
    assert refused > 200


def test_a_bit_changed_in_a_weight_is_refused_by_name(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"model": weights()}, path)
    whole = path.read_bytes()
    place = whole.index(weights()["blocks.1.weight"].numpy().tobytes()) + 1000
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 8]) + whole[place + 1 :])
    with pytest.raises(
        ValueError, match=r"weights\.pth' cannot be read: it is damaged, the checksum of its part '.*/data/"
    ):
        read_weights(path)


def safetensors(path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0\0\0")


def archive(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "no weights")


def scripted(path):
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(path))


@pytest.mark.parametrize(
    ("write", "found"),
    [
        (safetensors, "a safetensors file.*safetensors.torch.load_file"),
        (lambda path: path.write_text("\n<!DOCTYPE html><html>404</html>"), "HTML or XML page.*download it again"),
        (
            lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"),
            "pointer of Git LFS",
        ),
        (lambda path: path.write_text('{"lr": 1}'), "a JSON file"),
        (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n"), "an HDF5 file"),
        (lambda path: path.write_bytes(b""), "it is empty"),
        (archive, "a zip archive that torch.save did not write"),
        (scripted, "a TorchScript archive"),
        (lambda path: torch.save({"teacher": weights(), "epoch": 3}, path), "named tensors are under 'teacher'"),
    ],
    ids=["safetensors", "page", "lfs", "json", "hdf5", "empty", "zip", "torchscript", "teacher"],
)
def test_a_file_of_another_kind_is_refused_with_what_it_is(tmp_path, write, found):
    write(tmp_path / "model.pth")
    with pytest.raises(ValueError, match=rf"(?s)model\.pth'.*{found}"):
        read_weights(tmp_path / "model.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_named_and_no_advice_is_given_to_run_it(tmp_path, zipped):
    path = tmp_path / "evil.pth"
    torch.save({"model": Dangerous(tmp_path / "ran")}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"holds more than tensors and plain values \(\w+\.mkdir\)") as caught:
        read_weights(path)
    error = caught.value
    while error is not None:  # the whole chain that a traceback would show
        assert "weights_only" not in str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_the_prefix_of_a_wrapped_model_is_left_out(tmp_path, prefix):
    model, other = build(), build()
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save({"model": state}, tmp_path / "wrapped.pth")
    other.load_checkpoint(tmp_path / "wrapped.pth")
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


@pytest.mark.parametrize("name", ["resnet50", "swin_tiny_patch4_window7_224", "convnext_tiny"])
def test_a_model_that_is_no_vision_transformer_is_refused_as_such(name):
    with pytest.raises(ValueError, match=rf"^'{name}' is no Vision Transformer of timm's"):
        MAE.from_timm(name)
