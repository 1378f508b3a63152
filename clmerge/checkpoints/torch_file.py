"""Read files that ``torch.save`` wrote, from version 0.4 on: objects, and tensors as views of a memory map."""

import os
import struct
import zipfile
import zlib
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clmerge.checkpoints.pickled import Pickle, StoredTensor, unpickled

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # at the beginning of files from before PyTorch 1.6
_LOCAL = struct.Struct("<4s22xHH")  # a record's local header: signature, lengths of name and extra field
_LONGEST_CODE = 1 << 24
_DENSE = 1 << 26  # bytes up to which a tensor may be larger than its file, as an expanded tensor is


class TorchFile:
    """The content of a file that ``torch.save`` wrote, read without executing any of it.

    Args:
        path: The file.

    Attributes:
        path: The file.
        content: Its object, with ``StoredTensor`` for tensors and ``StandIn`` for objects of classes.
        ignored: Classes whose objects were left out.
        is_script: Whether ``torch.jit.save`` wrote it; its code is text that nothing runs.

    Raises:
        ValueError: If the file was not written by ``torch.save``, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_script = False
        self._code: dict[str, zipfile.ZipInfo] = {}
        self._sums: dict[str, int] = {}  # checksums of records that are not verified yet
        try:
            with path.open("rb") as file:
                is_zip = file.read(4) == b"PK\x03\x04"
            found = self._open_zip() if is_zip else self._open_legacy()
        except (ValueError, zipfile.BadZipFile, EOFError, NotImplementedError, struct.error) as error:
            raise ValueError(
                f"expected a file that torch.save wrote, got {path}: {error}; save or copy it again"
            ) from error
        self.content: Any = found.value
        self.ignored = found.ignored
        self._size = path.stat().st_size
        self._memory = torch.UntypedStorage.from_file(os.fspath(path), False, self._size)
        self._aligned: dict[str, torch.UntypedStorage] = {}

    def tensor(self, found: StoredTensor) -> Tensor:
        """Return a tensor: a view of the file, not to be written to.

        Raises:
            ValueError: If the file does not hold the data that the tensor's description refers to.
        """
        storage, item = found.storage, found.storage.dtype.itemsize
        if storage.key not in self._records:
            raise ValueError(f"expected its data in {self.path}, got no record {storage.key!r}; save or copy it again")
        start, nbytes = self._records[storage.key]
        if nbytes // item != storage.total or start + nbytes > self._size:
            raise ValueError(
                f"expected {storage.total * item:,} bytes of data in {self.path}, got a record of "
                f"{min(nbytes, self._size - start):,}; save or copy it again"
            )
        numel = prod(found.shape)
        last = found.offset + sum((side - 1) * step for side, step in zip(found.shape, found.stride, strict=True))
        if numel and (last + 1) * found.dtype.itemsize > storage.numel * item:
            raise ValueError(
                f"expected a tensor within its data in {self.path}, got shape {found.shape} with stride "
                f"{found.stride}, which reaches beyond its {storage.numel:,} entries; save or copy it again"
            )
        if numel * found.dtype.itemsize > max(self._size, _DENSE):
            raise ValueError(
                f"expected tensors that are no larger than {self.path}, got one of shape {found.shape}, which repeats "
                "what is stored; save a contiguous copy"
            )
        if not numel:
            return torch.empty(found.shape, dtype=found.dtype)
        if (start + storage.start * item) % found.dtype.itemsize:
            whole = self._aligned.setdefault(storage.key, self._memory[start : start + nbytes].clone())
        else:
            whole = self._memory[start : start + nbytes]
        part = whole[storage.start * item : (storage.start + storage.numel) * item]
        return torch.empty(0, dtype=found.dtype).set_(part, found.offset, found.shape, found.stride)

    def code(self, module: str) -> str:
        """Return the text of a module's code in a file of ``torch.jit.save``, empty if there is none; never run.

        Args:
            module: Its dotted name, such as ``__torch__.torch.nn.modules.linear``.

        Raises:
            ValueError: If the text is damaged, or longer than 16 MB.
        """
        info = self._code.get(f"code/{module.replace('.', '/')}.py")
        if info is None:
            return ""
        with zipfile.ZipFile(self.path) as archive:
            try:
                with archive.open(info) as record:
                    text = record.read(_LONGEST_CODE + 1)
            except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
                raise ValueError(f"expected the code of {module} in {self.path}, got {error}; copy it again") from error
        if len(text) > _LONGEST_CODE:
            raise ValueError(f"expected at most {_LONGEST_CODE:,} bytes of code of {module} in {self.path}, got more")
        return text.decode("utf-8", errors="replace")

    def verify(self, found: StoredTensor) -> None:
        """Compare the data of a tensor with the archive's checksum; each record is verified once.

        The older format has no checksums, and ``torch.save`` writes 0 for them after ``set_crc32_options(False)``.

        Args:
            found: A tensor that ``tensor`` has returned.

        Raises:
            ValueError: If the data does not match the checksum.
        """
        key = found.storage.key
        if expected := self._sums.get(key):
            start, nbytes = self._records[key]
            data = torch.empty(0, dtype=torch.uint8).set_(self._memory[start : start + nbytes], 0, (nbytes,), (1,))
            if zlib.crc32(data.numpy().data) != expected:
                raise ValueError(
                    f"expected the data that torch.save wrote in {self.path}, got a record {key!r} that its checksum "
                    "does not fit; copy or download it again"
                )
            self._sums.pop(key, None)

    def _open_zip(self) -> Pickle:
        with zipfile.ZipFile(self.path) as archive, self.path.open("rb") as file:
            self._records: dict[str, tuple[int, int]] = {}
            others: dict[str, zipfile.ZipInfo] = {}
            prefix = None
            for info in archive.infolist():
                folder, _, name = info.filename.partition("/")
                prefix = folder if prefix is None else prefix
                if folder != prefix or name in others:
                    raise ValueError(f"the record {info.filename!r}, which is there twice or in another folder")
                others[name] = info
            if "data.pkl" not in others:
                raise ValueError("a zip archive without data.pkl")
            self.is_script = "constants.pkl" in others
            self._code = {name: info for name, info in others.items() if name.startswith("code/")}
            if "byteorder" in others and self._bytes(file, others["byteorder"]) != b"little":
                raise ValueError("numbers with their largest byte first")
            for name, info in others.items():
                if name.startswith("data/"):
                    self._records[name.removeprefix("data/")] = self._place(file, info)
                    self._sums[name.removeprefix("data/")] = info.CRC
            return unpickled(self._bytes(file, others["data.pkl"]))

    def _place(self, file: Any, info: zipfile.ZipInfo) -> tuple[int, int]:
        """Return offset and length of a record's data."""
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise ValueError(f"the record {info.filename!r} compressed or encrypted")
        file.seek(max(0, info.header_offset))  # zipfile shifts it by the length of data before the archive
        signature, name, extra = _LOCAL.unpack(file.read(_LOCAL.size))
        if signature != b"PK\x03\x04" or info.header_offset < 0:
            raise ValueError(f"no record {info.filename!r} where the archive says that it is")
        return info.header_offset + _LOCAL.size + name + extra, info.file_size

    def _bytes(self, file: Any, info: zipfile.ZipInfo) -> bytes:
        start, size = self._place(file, info)
        file.seek(start)
        data: bytes = file.read(size)
        if len(data) != size:
            raise ValueError(f"the end of the file within {info.filename!r}")
        if info.CRC and zlib.crc32(data) != info.CRC:
            raise ValueError(f"a record {info.filename!r} that its checksum does not fit")
        return data

    def _open_legacy(self) -> Pickle:
        data = self.path.read_bytes()
        magic = _plain(data, 0)
        if magic.value != _MAGIC:
            raise ValueError("something else")
        protocol = _plain(data, magic.end)
        if protocol.value != _PROTOCOL:
            raise ValueError(f"version {str(protocol.value)[:20]} of the format")
        system = unpickled(data, protocol.end)
        found = unpickled(data, system.end)
        keys = unpickled(data, found.end)
        if not isinstance(keys.value, list):
            raise ValueError("no list of storages")
        self._records = {}
        position = keys.end
        for key in map(str, keys.value):
            [numel] = struct.unpack_from("<q", data, position)
            if key not in found.items or numel < 0:
                raise ValueError(f"the storage {key!r}, which no tensor uses or which is damaged")
            nbytes = numel * found.items[key]
            self._records[key] = position + 8, nbytes
            position += 8 + nbytes
        return found


def _plain(data: bytes, start: int) -> Pickle:
    try:
        return unpickled(data, start)
    except ValueError:
        raise ValueError("neither a zip archive nor the older format of torch.save") from None
