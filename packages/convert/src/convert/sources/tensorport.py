"""Reads what TensorPort makes of a Hugging Face checkpoint: folders of .npy files, MessagePack shards, pickle shards.

The manifest says which of the three it is and embeds the config. Names are Hugging Face's, in shards without "model.".
The .npy files are mapped; the shards are lists of numbers, one object a number, so nothing of them can be mapped. They
are walked through once to find where each tensor lies, and a tensor is decoded when it is read: a shard is never in
memory, and the pickles never reach an unpickler.
"""

import contextlib
import dataclasses
import math
import mmap
import operator
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from convert.errors import ConvertError
from convert.sources import (
    CONFIG,
    Source,
    SourceTensor,
    companions,
    npy,
    read_json,
    serde_pickle,
)
from convert.sources import msgpack_walker as walker

MANIFEST = "manifest.json"
NUMPY = "numpy_direct"
PICKLE = "tensorport_jax_pickle_sharded"
MSGPACK = ("tensorport_float16", "tensorport_float32")
EXPECTED = f"a folder that TensorPort wrote, with its {MANIFEST}"

DTYPES = {
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "uint8": np.dtype("u1"),
    "int64": np.dtype("<i8"),
}

_PART = 1 << 18  # numbers decoded at a time: their temporaries are a few megabytes
_decoding = threading.Lock()  # one tensor at a time: a decoded one is as large in memory as it is


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where the numbers of a tensor lie in a shard."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def recognizes(path: Path) -> bool:
    """Tells whether TensorPort wrote the folder `path`, by its manifest's "format"."""
    try:
        return read_json(path / MANIFEST).get("format") in (NUMPY, PICKLE, *MSGPACK)
    except ConvertError:
        return False


def open(path: Path) -> Source:
    """Opens the folder, after comparing what it holds with its manifest."""
    manifest = read_json(path / MANIFEST)
    format = manifest.get("format")
    if format == NUMPY:
        tensors, files = _read_arrays(path, manifest)
    elif format in (PICKLE, *MSGPACK):
        places = _pickled if format == PICKLE else _packed
        tensors, files = _read_shards(path, manifest, places)
    else:
        raise ConvertError(f"{path / MANIFEST}: format is {format!r}; expected {EXPECTED}")
    _check_count(path, manifest, tensors)
    config, config_files = _config(path, manifest)
    return Source(
        path=path,
        format="tensorport",
        config=config,
        tensors=tensors,
        files=(path / MANIFEST, *config_files, *files),
        companions=companions(path),
        notes=_notes(tensors),
    )


def _config(path: Path, manifest: Mapping[str, Any]) -> tuple[dict[str, Any], list[Path]]:
    """Returns the embedded config; TensorPort leaves it empty where its input had none, then it may lie beside."""
    config = manifest.get("config")
    if isinstance(config, dict) and config:
        return config, []
    if not (path / CONFIG).is_file():
        raise ConvertError(f"{path}: {MANIFEST} has no config; put Hugging Face's {CONFIG} there")
    return read_json(path / CONFIG), [path / CONFIG]


def _notes(tensors: Mapping[str, SourceTensor]) -> tuple[str, ...]:
    halves = sum(tensor.dtype == "float16" for tensor in tensors.values())
    if not halves:
        return ()
    return (
        f"{halves} tensors are float16: where the original was bfloat16, TensorPort has rounded, values below 6e-8 "
        "became 0, and what was beyond 65504 became infinite (which is refused); convert the original if you have it",
    )


def _check_count(
    path: Path, manifest: Mapping[str, Any], tensors: Mapping[str, SourceTensor]
) -> None:
    """Compares the numbers held with "total_parameters", where a byte of MXFP4 blocks counts as two."""
    found = sum(
        math.prod(tensor.shape) * (2 if "_blocks" in tensor.name and tensor.dtype == "uint8" else 1)
        for tensor in tensors.values()
    )
    if manifest.get("total_parameters") != found:
        raise ConvertError(
            f"{path}: {MANIFEST} counts {manifest.get('total_parameters')} parameters, its files hold {found}"
        )


def _read_arrays(
    path: Path, manifest: Mapping[str, Any]
) -> tuple[dict[str, SourceTensor], list[Path]]:
    entries = manifest.get("tensors")
    if not isinstance(entries, list) or not all(map(_is_sound, entries)):
        raise ConvertError(
            f"{path / MANIFEST}: no list of tensors with name, file, shape and dtype"
        )
    tensors: dict[str, SourceTensor] = {}
    problems, files = [], []
    for entry in entries:
        file = path / entry["file"]
        if entry["name"] in tensors or file in files:
            # TensorPort turns "." and "/" into "_": of two names that become one, it keeps the later tensor.
            problems.append(f"{entry['name']} or its file {entry['file']} appears twice")
        elif not file.is_file():
            problems.append(f"{entry['file']} is missing")
        else:
            tensor = _array(file, entry["name"])
            if (tensor.shape, tensor.dtype) != (tuple(entry["shape"]), _named(entry["dtype"])):
                problems.append(
                    f"{entry['file']} holds {tensor.dtype}{list(tensor.shape)}, "
                    f"the manifest says {entry['dtype']}{entry['shape']}"
                )
            tensors[entry["name"]] = tensor
            files.append(file)
    if problems:
        raise ConvertError(f"{path}: {MANIFEST} and the files differ", problems)
    return tensors, files


def _named(descr: str) -> str | None:
    return npy.DTYPES[descr].name if descr in npy.DTYPES else None


def _is_sound(entry: Any) -> bool:
    if not isinstance(entry, dict) or not all(
        isinstance(entry.get(key), str) for key in ("name", "file", "dtype")
    ):
        return False
    file = PurePosixPath(entry["file"])
    inside = not file.is_absolute() and ".." not in file.parts and "\0" not in entry["file"]
    return inside and isinstance(entry.get("shape"), list)


def _array(file: Path, name: str) -> SourceTensor:
    size = file.stat().st_size
    with file.open("rb") as opened:
        header = npy.read_header(opened.read(npy.HEADER_BYTES), str(file))
    if size != header.size + header.nbytes:
        state = "cut short: " if size < header.size + header.nbytes else ""
        raise ConvertError(
            f"{file}: {state}found {size} bytes, expected {header.size + header.nbytes} from its header"
        )

    def read() -> np.ndarray:
        # Not mapped before: several hundred maps would each hold a file open.
        if header.nbytes == 0:
            return np.empty(header.shape, header.dtype)
        with file.open("rb") as opened:
            data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        return _finite(npy.view(data, header, header.size), name)

    return SourceTensor(name, header.dtype.name, header.shape, read)


def _finite(array: np.ndarray, name: str) -> np.ndarray:
    """Returns `array` after checking that no value of float16 has been lost to infinity."""
    if array.dtype == np.float16:
        flat = array.reshape(-1)
        for start in range(0, flat.size, _PART):
            if np.isinf(flat[start : start + _PART]).any():
                raise ConvertError(
                    f"{name}: holds infinities: values of the original were beyond float16; "
                    "convert the original, or run TensorPort with --precision float32"
                )
    return array


_Places = Callable[[mmap.mmap, Path], Iterator[tuple[str, _Place, Callable[[], np.ndarray]]]]


def _read_shards(
    path: Path, manifest: Mapping[str, Any], places: _Places
) -> tuple[dict[str, SourceTensor], list[Path]]:
    shards = manifest.get("shards")
    if not isinstance(shards, list) or not all(map(_is_shard, shards)):
        raise ConvertError(f"{path / MANIFEST}: no list of shards with file and tensor_count")
    problems = []
    if manifest.get("total_shards") != len(shards):
        problems.append(f"total_shards is {manifest.get('total_shards')}, {len(shards)} are listed")
    problems += [f"{s['file']} is missing" for s in shards if not (path / s["file"]).is_file()]
    if problems:
        raise ConvertError(f"{path}: {MANIFEST} and the files differ", problems)
    tensors: dict[str, SourceTensor] = {}
    for shard in shards:
        found = _shard(path / shard["file"], places)
        if len(found) != shard["tensor_count"]:
            problems.append(
                f"{shard['file']} holds {len(found)} tensors, expected {shard['tensor_count']}"
            )
        problems += [f"{name} is there twice" for name in found.keys() & tensors.keys()]
        tensors |= found
    if problems:
        raise ConvertError(f"{path}: {MANIFEST} and the shards differ", problems)
    return tensors, [path / shard["file"] for shard in shards]


def _is_shard(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("file"), str)
        and Path(entry["file"]).name == entry["file"]
        and "\0" not in entry["file"]
        and type(entry.get("tensor_count")) is int
    )


def _shard(file: Path, places: _Places) -> dict[str, SourceTensor]:
    if file.stat().st_size == 0:
        raise ConvertError(f"{file}: empty")
    with file.open("rb") as opened:
        data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    tensors: dict[str, SourceTensor] = {}
    try:
        for name, place, decode in places(data, file):
            if name in tensors:
                raise walker.Malformed(f"{name[:60]!r} is there twice")
            tensors[name] = SourceTensor(
                name, place.dtype.name, place.shape, _reader(file, name, place, decode)
            )
    except walker.Malformed as error:
        raise ConvertError(f"{file}: {error}; copy or convert it again") from error
    return tensors


def _reader(
    file: Path, name: str, place: _Place, decode: Callable[[], np.ndarray]
) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        try:
            with _decoding:
                return _finite(decode().reshape(place.shape), name)
        except (walker.Malformed, ValueError, TypeError, OverflowError) as error:
            raise ConvertError(f"{file}: {name} cannot be decoded: {error}") from error

    return read


# MessagePack: a map of name to [shape, dtype, {Variant: numbers}], or to the same three by name.

_VARIANTS = {"Float16": "float16", "Float32": "float32", "Uint8": "uint8", "Int64": "int64"}
_FLOAT32 = np.dtype([("tag", "u1"), ("value", ">f4")])


def _packed(data: mmap.mmap, file: Path) -> Iterator[tuple[str, _Place, Callable[[], np.ndarray]]]:
    top = walker.expect(data, 0, "map")
    end = top.start
    for _ in range(top.size):
        name, end = walker.text(data, end)
        place = _packed_place(data, file, end)
        end = place.end
        yield name, place, lambda place=place: _unpack(data, file, place)
    if end != len(data):
        raise walker.Malformed(f"{len(data)} bytes, of which the tensors take {end}")


def _packed_place(data: mmap.mmap, file: Path, offset: int) -> _Place:
    """Returns the tensor at `offset`; its `start` is that of the numbers' list, header included."""
    found = walker.item(data, offset)
    if found.kind not in ("array", "map") or found.size != 3:
        raise walker.Malformed(f"byte {offset}: expected a tensor of shape, dtype and data")
    key = _key if found.kind == "map" else lambda data, offset, name: offset
    shape, end = walker.sizes(data, key(data, found.start, "shape"))
    dtype, end = walker.text(data, key(data, end, "dtype"))
    end = key(data, end, "data")
    variant = walker.expect(data, end, "map")
    kind, start = walker.text(data, variant.start)
    if variant.size != 1 or _VARIANTS.get(kind) != dtype:
        raise walker.Malformed(f"byte {end}: a tensor of {dtype[:60]!r} has data of {kind[:60]!r}")
    numbers = walker.expect(data, start, "array")
    if numbers.size != math.prod(shape):
        raise walker.Malformed(f"byte {start}: {numbers.size} numbers do not make {list(shape)}")
    return _Place(DTYPES[dtype], shape, start, _list_end(data, file, numbers, dtype, start))


def _key(data: mmap.mmap, offset: int, name: str) -> int:
    """Returns where the key `name` ends, which is to be at `offset`."""
    found, end = walker.text(data, offset)
    if found != name:
        raise walker.Malformed(f"byte {offset}: expected {name}, found {found[:60]!r}")
    return end


def _list_end(data: mmap.mmap, file: Path, numbers: walker.Item, dtype: str, start: int) -> int:
    """Returns where a list of numbers ends: every float takes 5 bytes, an integer 1 to 9."""
    if dtype == "float32":
        end = numbers.start + _FLOAT32.itemsize * numbers.size
        if end > len(data):
            raise walker.Malformed(f"cut short: a list at byte {start} ends at {end}")
        return end
    if numbers.start + numbers.size > len(data):
        raise walker.Malformed(f"cut short: a list of {numbers.size} at byte {start}")
    with _unpacker(file, start) as unpacker:
        unpacker.skip()
        return start + unpacker.tell()


@contextlib.contextmanager
def _unpacker(file: Path, start: int) -> Iterator[Any]:
    """Gives msgpack's own reader, at `start` of `file`, with a buffer of megabytes: in C, 5 ns a number to skip."""
    import msgpack

    with file.open("rb") as opened:
        opened.seek(start)
        try:
            yield msgpack.Unpacker(
                opened, read_size=_PART, max_buffer_size=4 * _PART, max_array_len=1 << 32
            )
        except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
            raise walker.Malformed(f"no list of numbers: {error!r:.100}") from error


def _unpack(data: mmap.mmap, file: Path, place: _Place) -> np.ndarray:
    if place.dtype == np.float32:
        start = place.end - _FLOAT32.itemsize * place.count
        pairs = np.ndarray((place.count,), _FLOAT32, buffer=data, offset=start)
        if not (pairs["tag"] == 0xCA).all():
            raise walker.Malformed("a number that is no float32")
        return pairs["value"].astype("<f4")
    if place.dtype == np.uint8:
        return _unpack_bytes(data, walker.item(data, place.start).start, place)
    bits = np.dtype("<u2") if place.dtype == np.float16 else place.dtype
    result = np.empty(place.count, bits)
    with _unpacker(file, place.start) as unpacker:
        unpacker.read_array_header()
        numbers = map(operator.index, unpacker)  # which takes no float and no text for a number
        for start in range(0, place.count, _PART):
            count = min(_PART, place.count - start)
            result[start : start + count] = np.fromiter(numbers, bits, count)
    return result.view(place.dtype)


def _unpack_bytes(data: mmap.mmap, start: int, place: _Place) -> np.ndarray:
    """Returns the bytes of a list whose first is at `start`: below 128 they stand for themselves, 0xcc is before any.

    Where 0xcc follows 0xcc, the first is the mark, the second a byte, the third a mark.
    """
    result, filled = np.empty(place.count, np.uint8), 0
    while start < place.end:
        coded = np.frombuffer(data, np.uint8, min(_PART, place.end - start), start)
        index = np.arange(coded.size)
        before = np.maximum.accumulate(np.where(coded == 0xCC, -1, index))
        is_mark = (coded == 0xCC) & ((index - before) % 2 == 1)
        if is_mark[-1] and start + coded.size < place.end:  # its byte is in the next piece
            coded, is_mark = coded[:-1], is_mark[:-1]
        stands_alone = ~is_mark
        stands_alone[1:] &= ~is_mark[:-1]
        values = coded[~is_mark]
        if (coded[stands_alone] >= 0x80).any() or filled + values.size > place.count:
            raise walker.Malformed("a number that is no byte")
        result[filled : filled + values.size] = values
        start, filled = start + coded.size, filled + values.size
    if filled != place.count:
        raise walker.Malformed(f"{filled} numbers, expected {place.count}")
    return result


# Pickle: a map of name to {shape, dtype, data: list of bytes}.


def _pickled(data: mmap.mmap, file: Path) -> Iterator[tuple[str, _Place, Callable[[], np.ndarray]]]:
    reader = serde_pickle.Reader(data)
    reader.take(b"\x80\x03}")
    if reader.next_is(b"("):
        yield from _pickled_tensors(reader)
        reader.take(b"u")
    reader.take(b".")
    if reader.at != len(data):
        raise walker.Malformed(f"{len(data)} bytes, of which the pickle takes {reader.at}")


def _pickled_tensors(
    reader: serde_pickle.Reader,
) -> Iterator[tuple[str, _Place, Callable[[], np.ndarray]]]:
    reader.take(b"(")
    data = reader.data
    while not reader.next_is(b"u"):
        name = reader.text()
        place = _pickled_place(reader)
        yield name, place, lambda place=place: _unpickle(data, place)
        if reader.next_is(b"u("):  # a batch of a thousand ends
            reader.take(b"u(")


def _pickled_place(reader: serde_pickle.Reader) -> _Place:
    reader.take(b"}(")
    fields: dict[str, Any] = {}
    for key, read in (("shape", reader.sizes), ("dtype", reader.text)):
        found = reader.text()
        if found != key:
            raise walker.Malformed(f"byte {reader.at}: expected {key}, found {found[:60]!r}")
        fields[key] = read()
    if fields["dtype"] not in DTYPES:
        raise walker.Malformed(f"byte {reader.at}: dtype is {fields['dtype'][:60]!r}")
    if (found := reader.text()) != "data":
        raise walker.Malformed(f"byte {reader.at}: expected data, found {found[:60]!r}")
    dtype = DTYPES[fields["dtype"]]
    start = reader.skip_bytes(math.prod(fields["shape"]) * dtype.itemsize)
    end = reader.at
    reader.take(b"u")
    return _Place(dtype, fields["shape"], start, end)


def _unpickle(data: mmap.mmap, place: _Place) -> np.ndarray:
    count = place.count * place.dtype.itemsize
    return serde_pickle.read_bytes(data, place.start, count).view(place.dtype)
