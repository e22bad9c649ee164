"""Reads what np.savez writes: a zip of .npy arrays by name, stored or compressed.

Stored arrays are mapped where they lie. Every array's CRC32 is checked when it is read. An array of Python objects is
a pickle, and refused.
"""

import mmap
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from convert.errors import ConvertError
from convert.sources import CONFIG, Source, SourceTensor, companions, npy, params_tree

FILE = "model.npz"
EXPECTED = f"one .npz file (or a folder with {FILE}) beside its {CONFIG}"

_PART = 1 << 20
_INFLATION = 1040  # how much longer than its compressed form deflate's output can be
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    ValueError,
)
"""What zipfile raises for archives that are damaged, encrypted or made by hand."""


def recognizes(path: Path) -> bool:
    """Tells whether an .npz lies at `path`: a zip whose first entry is a .npy, or the only such file of a folder."""
    file = _file(path)
    if file is None:
        return False
    try:
        with file.open("rb") as opened:
            start = opened.read(30)
            name = opened.read(int.from_bytes(start[26:28], "little"))
    except OSError:
        return False
    return start[:4] == b"PK\x03\x04" and (name.endswith(b".npy") or name == CONFIG.encode())


def open(path: Path) -> Source:
    """Opens an .npz with the config.json that is in it or beside it."""
    file = _file(path)
    if file is None:
        raise ConvertError(f"{path}: expected {EXPECTED}")
    try:
        archive = zipfile.ZipFile(file)
    except _DAMAGE as error:
        raise ConvertError(f"{file}: no zip archive that can be read: {error}") from error
    tensors: dict[str, SourceTensor] = {}
    notes = []
    for info in archive.infolist():
        if info.filename == CONFIG:
            continue
        name = info.filename.removesuffix(".npy")
        if name == info.filename:
            raise ConvertError(f"{file}: holds {name[:60]!r}, which is no .npy array")
        if name in tensors:
            raise ConvertError(f"{file}: holds {name[:60]!r} twice")
        tensors[name], header = _tensor(file, archive, info, name)
        if header.descr.endswith("V2"):
            notes.append(name)
    named, left_out = params_tree.parameters(_dotted(tensors))
    config_file, config = _config(file, archive)
    if notes:
        left_out += (f"{len(notes)} arrays of two raw bytes a number are read as bfloat16",)
    return Source(
        path=path,
        format="npz",
        config=config,
        tensors=named,
        files=(file,) if config_file is None else (config_file, file),
        companions=companions(file.parent),
        notes=left_out,
    )


def _file(path: Path) -> Path | None:
    if path.is_file():
        return path
    if (path / FILE).is_file():
        return path / FILE
    try:
        found = sorted(path.glob("*.npz"))
    except OSError:
        return None
    return found[0] if len(found) == 1 else None


def _config(file: Path, archive: zipfile.ZipFile):
    """Returns the config and the file it is in, None if that is the archive."""
    import json

    if CONFIG not in archive.namelist():
        return params_tree.read_config(file, [file.parent])
    try:
        if archive.getinfo(CONFIG).file_size > _PART:
            raise ValueError(f"of {archive.getinfo(CONFIG).file_size:,} bytes")
        config = json.loads(archive.read(CONFIG))
    except (*_DAMAGE, RecursionError) as error:
        raise ConvertError(f"{file}: its {CONFIG} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ConvertError(f"{file}: its {CONFIG} is no JSON object")
    return None, config


def _dotted(tensors: dict[str, SourceTensor]) -> dict[str, SourceTensor]:
    """Returns the tensors by names joined by dots, where all are paths joined by slashes."""
    if any("." in name for name in tensors):
        return tensors
    return params_tree.renamed(tensors, lambda name: name.replace("/", "."))


def _tensor(
    file: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str
) -> tuple[SourceTensor, npy.Header]:
    where = f"{file}: {name[:60]}"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
        raise ConvertError(f"{where}: is encrypted, or compressed in a way that numpy never does")
    start = _data_start(file, info, where)
    try:
        with archive.open(info) as stream:
            header = npy.read_header(stream.read(npy.HEADER_BYTES), where)
    except _DAMAGE as error:
        raise ConvertError(f"{where}: cannot be read: {error}") from error
    if header.size + header.nbytes != info.file_size:
        raise ConvertError(
            f"{where}: {info.file_size} bytes do not hold {header.dtype.name}{list(header.shape)}, "
            f"which takes {header.size + header.nbytes}"
        )
    if info.compress_type == zipfile.ZIP_STORED:
        read = _mapped(file, info, header, start, where)
    elif info.file_size > _INFLATION * info.compress_size + _PART:
        raise ConvertError(
            f"{where}: {info.compress_size} bytes cannot hold {info.file_size}, however compressed"
        )
    else:
        read = _inflated(archive, info, header, where)
    return SourceTensor(name, header.dtype.name, header.shape, read), header


def _data_start(file: Path, info: zipfile.ZipInfo, where: str) -> int:
    """Returns where an entry's data begin: the directory does not say, its own header does."""
    with file.open("rb") as opened:
        opened.seek(info.header_offset)
        local = opened.read(30)
    start = info.header_offset + 30
    start += sum(int.from_bytes(local[i : i + 2], "little") for i in (26, 28))
    size = file.stat().st_size
    if local[:4] != b"PK\x03\x04" or start + info.compress_size > size:
        raise ConvertError(
            f"{where}: cut short: ends at byte {start + info.compress_size} of {size}"
        )
    if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
        raise ConvertError(f"{where}: stored, but of two sizes")
    return start


def _mapped(
    file: Path, info: zipfile.ZipInfo, header: npy.Header, start: int, where: str
) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        with file.open("rb") as opened:
            buffer = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        crc, data = 0, memoryview(buffer)[start : start + info.file_size]
        for begin in range(0, len(data), _PART):
            crc = zlib.crc32(data[begin : begin + _PART], crc)
        if crc != info.CRC:
            raise ConvertError(f"{where}: the data are damaged: another CRC than was stored")
        return npy.view(buffer, header, start + header.size)

    return read


def _inflated(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, header: npy.Header, where: str
) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        data = np.empty(header.nbytes, np.uint8)
        try:
            with archive.open(info) as stream:
                stream.read(header.size)
                end = 0
                while part := stream.read(_PART):  # at the end the CRC is checked
                    data[end : end + len(part)] = np.frombuffer(part, np.uint8)
                    end += len(part)
        except _DAMAGE as error:
            raise ConvertError(f"{where}: the data are damaged: {error}") from error
        return npy.view(data.data, header, 0)

    return read
