"""One checkpoint file: what it says of itself, what it holds, whether it is intact."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from seedvc_ckpt.errors import CorruptCheckpointError, PatternError
from seedvc_ckpt.format import contents
from seedvc_ckpt.format.archive import Archive
from seedvc_ckpt.format.contents import TensorRef
from seedvc_ckpt.format.unpickle import list_globals
from seedvc_ckpt.storage import Storage, open_parent, open_storage, read_chunks

if TYPE_CHECKING:
    import torch

    from seedvc_ckpt.manifest import Manifest
    from seedvc_ckpt.naming import NamePattern

__all__ = ["CheckpointFile", "Inspection", "run_name"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint holds; no tensor data was read for it.

    Attributes:
        name: The file.
        size: Its bytes.
        manifest: What it says of itself; None in files of others.
        tree: The state with a `TensorRef` (dtype, shape, stride, nbytes) in place of each tensor.
        tensors: Each tensor by its path, such as ``net['cfm']['estimator.input_pos']``.
    """

    name: str
    size: int
    manifest: Manifest | None
    tree: Any
    tensors: dict[str, TensorRef]

    @property
    def keys(self) -> list[str]:
        """The state's top-level keys."""
        return list(map(str, self.tree)) if isinstance(self.tree, dict) else []


class CheckpointFile:
    """A file in a storage. With a pattern, a manifest that contradicts the file's name counts as damage."""

    def __init__(self, storage: Storage, name: str, pattern: NamePattern | None = None) -> None:
        self.storage = storage
        self.name = name
        self.pattern = pattern

    @classmethod
    def at(cls, location: str | os.PathLike[str]) -> CheckpointFile:
        """The file at a path or URL."""
        return cls(*open_parent(location))

    @contextmanager
    def opened(self) -> Iterator[Archive]:
        """The file's directory, checked."""
        with self.storage.open(self.name) as blob:
            yield Archive.open(blob)

    def manifest(self) -> Manifest | None:
        """What the file says of itself; None in files of others."""
        with self.opened() as archive:
            return self.manifest_of(archive)

    def manifest_of(self, archive: Archive) -> Manifest | None:
        """The manifest in the opened file; None in files of others."""
        manifest = archive.manifest()
        if not (manifest and self.pattern):
            return manifest
        if self._belongs_to_another(manifest, self.pattern):
            raise CorruptCheckpointError(
                archive.source.name,
                "the manifest",
                f"says step {manifest.step}, epoch {manifest.epoch}: the file was renamed, or swapped with another",
            )
        return manifest

    def inspect(self) -> Inspection:
        """What it holds, without reading tensor data."""
        with self.opened() as archive:
            tree = contents.read_tree(archive)
            tensors = {
                contents.path_text(path): leaf for path, leaf in contents.walk(tree) if isinstance(leaf, TensorRef)
            }
            return Inspection(archive.source.name, archive.source.size, self.manifest_of(archive), tree, tensors)

    def globals(self) -> list[str]:
        """The names that the file's pickle asks for, without loading it."""
        with self.opened() as archive:
            return list_globals(archive.pickle())

    def verify(self, progress: Callable[[int], None] = lambda _: None) -> Sequence[str]:
        """Check every byte; `progress` is called with the number of bytes done since the last call.

        Returns:
            What is odd about an intact file: a step inside that its name contradicts, in files without a manifest.

        Raises:
            CorruptCheckpointError: naming the record, and the tensor in it, that is damaged.
            UnsafeCheckpointError: if it holds more than plain data and tensors.
        """
        with self.opened() as archive:
            self.manifest_of(archive)
            tree = contents.read_tree(archive)
            archive.verify(contents.storage_names(tree), progress)
            return self._oddities(archive, tree)

    def load(
        self,
        *,
        map_location: str | torch.device = "cpu",
        mmap: bool = False,
        verify: bool = True,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> Any:
        """The state; see `CheckpointStore.load`."""
        from seedvc_ckpt.format import torchzip  # torch takes more than a second to import

        if cache_dir is not None:
            return self._load_cached(cache_dir, map_location=map_location, verify=verify)
        with self.opened() as archive:
            self.manifest_of(archive)
            state = torchzip.decode(archive, map_location=map_location, verify=verify, mmap=mmap)
            for oddity in self._oddities(archive, state):
                _log.warning("%s %s", archive.source.name, oddity)
            return state

    def _load_cached(self, cache_dir: str | os.PathLike[str], **options: Any) -> Any:
        """Load by mapping a copy on this machine; one that is damaged is fetched again."""
        with self.storage.open(self.name) as blob:
            if blob.map() is not None:
                return self.load(mmap=True, **options)
        found = self.storage.stat(self.name)
        identity = f"{self.storage.location}\0{self.name}\0{found}"
        folder = os.path.join(cache_dir, hashlib.sha256(identity.encode()).hexdigest()[:16])
        copy = CheckpointFile(open_storage(folder), self.name, self.pattern)
        if copy.storage.stat(self.name) is not None:
            with suppress(CorruptCheckpointError):
                return copy.load(mmap=True, **options)
        with self.storage.open(self.name) as blob:
            copy.storage.publish(self.name, blob.size, read_chunks(blob), overwrite=True)
        return copy.load(mmap=True, **options)

    def _oddities(self, archive: Archive, state: Any) -> Sequence[str]:
        named = self.pattern.parse(self.name) if self.pattern and not archive.ours else None
        iters = state.get("iters") if named and isinstance(state, dict) else None
        if named is None or type(iters) is not int or iters == named.step:
            return ()
        return (f"is named step {named.step} but holds step {iters} ('iters'): it was renamed or swapped with another",)

    def _belongs_to_another(self, manifest: Manifest, pattern: NamePattern) -> bool:
        try:
            return manifest.step is None or pattern.format(manifest.step, manifest.epoch) != self.name
        except PatternError:
            return True  # a number that no name can hold


def run_name(location: str) -> str:
    """The last part of a store's location, relative ones such as ``.`` resolved."""
    name = location.rstrip("/").rpartition("/")[2]
    name = os.path.basename(os.path.abspath(location)) if name in ("", ".", "..") else name
    return os.fsencode(name).decode(errors="replace")  # a manifest is UTF-8, a folder's name need not be
