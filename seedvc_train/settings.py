"""What a run has to keep for its continuation to be the same run."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch

from seedvc_ckpt.manifest import Setting
from seedvc_train.config import Config
from seedvc_train.dataset import Corpus

__all__ = ["Settings"]

_SHOWN = 8
# what of the model a service sets up from the YAML beside the weights, and must set up as training did
_OF_THE_SERVICE = (
    "model_params.speech_tokenizer.",
    "model_params.style_encoder.dim",
    "model_params.length_regulator.f0_condition",
    "model_params.length_regulator.n_f0_bins",
    "model_params.DiT.f0_condition",
)
# what runs were made with before there were options to change it
_BEFORE = {"precision": "fp32", "tf32": False, "accumulate": 1, "ema": None, "val_split": None}


@dataclass(frozen=True)
class Settings:
    """Config, options and data of a run, reduced to what changes its numbers.

    Attributes:
        values: Plain values by dotted names.
        files: Digest of each clip's bytes, by its path in the data set.
    """

    values: dict[str, Any]
    files: dict[str, str]

    @classmethod
    def of(cls, config: Config, corpus: Corpus, **options: Any) -> Settings:
        """The settings of a run; `options` are those of the command line."""
        sections = config.model_dump(mode="json", by_alias=True, include={"preprocess_params", "model_params"})
        values = {**dict(_flat(sections)), **options}
        return cls(values, {clip.path: clip.digest for clip in corpus.clips})

    def for_manifest(self) -> dict[str, Setting]:
        """What a service has to agree with, the options of the run, and the digest of its data (`Corpus.digest`)."""
        kept = {
            name: value
            for name, value in self.values.items()
            if name.startswith(_OF_THE_SERVICE) or not name.startswith("model_params.")
        }
        plain = {name: value for name, value in kept.items() if value is None or type(value) in (str, bool, int, float)}
        return {**plain, "data": blake2b(self._listed_files(), digest_size=16).hexdigest()}

    def _listed_files(self) -> bytes:
        lines = "".join(f"{digest} {path}\0" for path, digest in self.files.items())
        return lines.encode("utf-8", "surrogateescape")

    def to_plain(self) -> dict[str, Any]:
        """The settings as a checkpoint keeps them; the file list as bytes, to keep the pickle small."""
        listed = bytearray(self._listed_files())
        files = torch.frombuffer(listed, dtype=torch.uint8) if listed else torch.empty(0, dtype=torch.uint8)
        return {"values": dict(self.values), "files": files}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Settings:
        """The settings that a checkpoint keeps."""
        text = bytes(plain["files"].tolist()).decode("utf-8", "surrogateescape")
        entries = (line.split(" ", 1) for line in text.split("\0") if line)
        return cls({**_BEFORE, **plain["values"]}, {path: digest for digest, path in entries})

    def changes(self, now: Settings) -> list[str]:
        """In words, what differs in `now`; empty when the run can go on as the same run."""
        names = {**self.values, **now.values}
        lines = [
            f"{name}: {self.values.get(name, 'not set')} then, {now.values.get(name, 'not set')} now"
            for name in names
            if self.values.get(name) != now.values.get(name)
        ]
        files = [f"data: {path} is new" for path in now.files if path not in self.files]
        files += [f"data: {path} is gone" for path in self.files if path not in now.files]
        files += [
            f"data: {path} has other contents"
            for path, digest in self.files.items()
            if now.files.get(path, digest) != digest
        ]
        if len(files) > _SHOWN:
            rest = len(files) - _SHOWN
            files = [*files[:_SHOWN], f"data: and {rest} more ({len(self.files)} clips then, {len(now.files)} now)"]
        return lines + files

    def moves_batches(self, now: Settings) -> bool:
        """Whether the batches of an epoch are others now, so that a position in it means nothing."""
        keys = ("seed", "batch_size")
        return any(self.values.get(key) != now.values.get(key) for key in keys) or self.files != now.files


def _flat(section: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in section.items():
        name = f"{prefix}{key}"
        found += _flat(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return found
