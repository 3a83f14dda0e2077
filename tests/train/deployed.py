"""Files and configs as they are deployed, for the tests: in no more room than they need."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import yaml

from seedvc_ckpt import CheckpointStore
from seedvc_ckpt.cli.model import describe
from seedvc_ckpt.deploy import flat

DATA = Path(__file__).parent.parent / "data"
PRESETS = json.loads((DATA / "presets.json").read_text())
KEYS = json.loads((DATA / "state_dict_keys.json").read_text())
TINY, SMALL, LARGE = (
    f"config_dit_mel_seed_uvit_{name}.yml" for name in ("xlsr_tiny", "whisper_small_wavenet", "whisper_base_f0_44k")
)


def small(preset: str) -> dict[str, Any]:
    """A preset with narrow, few layers: all that a service sets up beside the network stays as it is."""
    config = copy.deepcopy(PRESETS[preset])
    model = config["model_params"]
    model["DiT"].update(hidden_dim=32, num_heads=2, depth=3, content_dim=24, content_codebook_size=8)
    model["length_regulator"].update(channels=24, content_codebook_size=8, n_f0_bins=16)
    if "wavenet" in model:
        model["wavenet"].update(hidden_dim=32, num_layers=2)
    return config


def weights(config: dict[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """Every tensor that the config's model has, filled with one number that takes no room in a file."""
    net: dict[str, dict[str, torch.Tensor]] = {}
    for name, shape in describe("config.yml", yaml.safe_dump(config).encode()).expected.items():
        module, _, key = name.partition(".")
        value = torch.tensor(1) if key.endswith("input_pos") else torch.tensor(0.5)
        net.setdefault(module, {})[key] = value.expand(shape)
    return net


def listed(preset: str) -> dict[str, dict[str, torch.Tensor]]:
    """A file's weights by the list of a preset's keys, shapes and types; in no more room than one number each."""
    (name,) = [name for name in KEYS if name in preset]
    return {
        module: {
            key: torch.zeros((), dtype=getattr(torch, kind.removeprefix("torch."))).expand(shape)
            for key, (shape, kind) in tensors.items()
        }
        for module, tensors in KEYS[name].items()
    }


def written(folder: Path, state: Any, config: dict[str, Any]) -> tuple[Path, Path]:
    torch.save(state, folder / "ft_model.pth")
    (folder / "config.yml").write_text(yaml.safe_dump(config))
    return folder / "ft_model.pth", folder / "config.yml"


def exported(folder: Path, config: dict[str, Any], net: Any = None, **settings: Any) -> tuple[Path, Path]:
    """An export of a run that was trained with a config, and the config."""
    described = describe("config.yml", yaml.safe_dump(config).encode())
    kept = {
        name: value
        for name, value in flat(described.values).items()
        if name.startswith(("preprocess_params.", "model_params.speech_tokenizer.", "model_params.style_encoder.dim"))
    }
    file, path = written(folder, {}, config)
    with CheckpointStore(folder / "run") as store:
        given = {**kept, "features": "config", **settings}
        store.save({"net": net or weights(config)}, 500, settings=given, overwrite=True)
        store.export(file, overwrite=True)
    return file, path
