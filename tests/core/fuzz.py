"""Broken checkpoints by the thousand: `python tests/core/fuzz.py --n 10000`.

Every file must open or raise PluribusError, within a second and without much memory. What it raises
otherwise, the seed says how to make again.
"""

import argparse
import io
import json
import pickletools
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from pathlib import Path

from pluribus.core.dtypes import DTYPES
from pluribus.core.errors import PluribusError
from pluribus.core.weights import Weights

EXTREME = [0, 1, 7, 8, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**48, 2**63 - 1, 2**64 - 1]
ODD = [
    *(None, True, False, -1, 0, 1, 2**31, 2**63, 2**70, 10**400, 0.5, float("nan"), float("inf")),
    *(
        "",
        "F32",
        "__metadata__",
        "\ud800",
        "../x",
        "a" * 300,
        [],
        {},
        [[]],
        [-1, 8],
        [0, 0],
        [8, 0],
    ),
]
DEEP = [b"[" * 50_000, b'{"a":' * 50_000, b"[" * 50_000 + b"]" * 50_000]


def safetensors_file(rng: random.Random) -> bytes:
    """Return a safetensors file whose header was tampered with."""
    table: dict = {"__metadata__": {"format": "pt", "z": "a"}}
    at = 0
    for name in "abcd":
        kind, shape = rng.choice(list(DTYPES)), [rng.randrange(4) for _ in range(rng.randrange(4))]
        size = DTYPES[kind].size
        for dim in shape:
            size *= dim
        table[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    for _ in range(rng.choice([0, 0, 1, 1, 2, 3])):
        entry = table.get(rng.choice("abcd"))
        step = rng.randrange(9)
        if not isinstance(entry, dict):
            continue
        if step == 0:
            table[rng.choice("abcd")] = rng.choice(ODD)
        elif step == 1:
            entry[rng.choice(["dtype", "shape", "data_offsets", "x"])] = rng.choice(ODD)
        elif step in (2, 3):
            inner = entry.get(rng.choice(["shape", "data_offsets"]))
            if isinstance(inner, list) and inner:
                inner[rng.randrange(len(inner))] = rng.choice([*ODD, *EXTREME])
        elif step == 4:
            entry.pop(rng.choice(list(entry)), None)
        elif step == 5:
            table["__metadata__"] = rng.choice([*ODD, {"k": 1}, {"k": {}}, {"a": "b"}, {"q": "q"}])
        elif step == 6 and isinstance(entry.get("data_offsets"), list):
            shift = rng.choice([-8, -1, 1, 8])
            entry["data_offsets"] = [
                o + shift if type(o) is int else o for o in entry["data_offsets"]
            ]
        else:
            at += rng.choice([-1, 1, 8])
    header = json.dumps(table).encode()
    if rng.random() < 0.1:
        header = header[:-1] + b"," + header[1:]  # every key twice
    if rng.random() < 0.1:
        header = rng.choice(DEEP)
    if rng.random() < 0.1:
        header = header.replace(b'"a"', b'"\xff\xfe"')
    length = len(header) if rng.random() < 0.9 else rng.choice([*EXTREME, len(header) + 1])
    return struct.pack("<Q", length) + header + bytes(max(at, 0))


def _dump(rng: random.Random) -> tuple[bytes, list[bytes]]:
    """Return the pickle of a state dict, by hand, and its storages."""
    out, records = [b"\x80\x02ccollections\nOrderedDict\nq\x00)Rq\x01("], []
    for number in range(4):
        rows, cols = rng.randrange(4), rng.randrange(4)
        count = rows * cols
        records.append(bytes(4 * count))
        key = str(number).encode()
        out.append(b"X\x01\x00\x00\x00" + bytes([97 + number]))
        out.append(b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage")
        out.append(b"ctorch\nFloatStorage\nX\x01\x00\x00\x00" + key + b"X\x03\x00\x00\x00cpu")
        out.append(b"K" + bytes([count]) + b"tQK\x00K" + bytes([rows]) + b"K" + bytes([cols]))
        out.append(b"\x86K" + bytes([cols]) + b"K\x01\x86\x89h\x00)RtR")
    return b"".join(out) + b"u.", records


OPCODES = [op.code.encode("latin-1") for op in pickletools.opcodes]
WORDS = [
    *(b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nSize\n", b"ctorch\nfloat16\n"),
    *(b"ctorch._tensor\n_rebuild_from_type_v2\n", b"ctorch._utils\n_rebuild_tensor_v3\n"),
    *(b"K\x01", b"M\xff\xff", b"J\xff\xff\xff\xff", b"\x8a\x09" + b"\xff" * 8 + b"\x00"),
    *(b"X\xff\xff\xff\xff", b"r\xff\xff\xff\xff", b"j\xff\xff\xff\xff", b"G" + b"\x7f" * 8),
    *(b"q\x09h\x09h\x09\x86" * 30, b"N\x85" * 2000, b"h\x00", b"q\x05", b"\x93", b"\x94"),
    *(b"}", b"]", b"(", b"t", b"R", b"Q", b"b", b"\x81"),
]


def torch_file(rng: random.Random) -> bytes:
    """Return a zip as torch.save makes it, with a tampered pickle, records or directory."""
    pickled, records = _dump(rng)
    for _ in range(rng.choice([0, 0, 1, 1, 2])):
        at = rng.randrange(len(pickled) + 1)
        step = rng.randrange(4)
        if step == 0:
            pickled = pickled[:at] + rng.choice(WORDS) + pickled[at:]
        elif step == 1:
            pickled = pickled[:at] + rng.choice(OPCODES) + pickled[at + 1 :]
        elif step == 2:
            pickled = flipped(pickled, rng, 2)
        else:
            pickled = pickled[:at] + pickled[at + rng.randrange(20) :]
    if rng.random() < 0.1:
        words = [*WORDS, *OPCODES]
        pickled = b"\x80\x02" + b"".join(rng.choice(words) for _ in range(rng.randrange(60)))
    out = io.BytesIO()
    packing = zipfile.ZIP_DEFLATED if rng.random() < 0.05 else zipfile.ZIP_STORED
    root = rng.choice([*["m"] * 20, "..", "", "a/b"])
    with zipfile.ZipFile(out, "w", packing) as archive:
        archive.writestr(f"{root}/data.pkl", pickled)
        if rng.random() < 0.5:
            archive.writestr(f"{root}/byteorder", rng.choice([*["little"] * 9, "big"]))
        for number, data in enumerate(records):
            if rng.random() < 0.98:
                data = data if rng.random() < 0.98 else data + bytes(rng.randrange(1, 9))
                archive.writestr(f"{root}/data/{number}", data)
        if rng.random() < 0.05:
            archive.writestr(rng.choice(["m/code/x", "../x", "/x", "n/data.pkl"]), b"")
        if rng.random() < 0.02:
            archive.comment = b"c" * 100
    return out.getvalue()


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def gguf_file(rng: random.Random) -> bytes:
    """Return a GGUF file with tampered counts, types, sizes and offsets."""

    def odd(usual: int, bits: int) -> int:
        return rng.choice(EXTREME) % (1 << bits) if rng.random() < 0.01 else usual

    pairs = [_text(b"general.architecture") + struct.pack("<I", 8) + _text(b"llama")]
    for key in (b"llama.attention.head_count", b"llama.attention.head_count_kv"):
        pairs.append(_text(key) + struct.pack("<II", odd(4, 32), odd(2, 32)))
    if rng.random() < 0.3:
        pairs.append(
            _text(b"general.alignment") + struct.pack("<II", 4, rng.choice([8, 32, 32, 64, 0, 3]))
        )
    kind = rng.choice([8, 8, 8, 8, 8, 4, 9, 13])
    array = struct.pack("<IIQ", 9, odd(kind, 32), odd(2, 64)) + _text(b"aa") + _text(b"b")
    pairs.append(_text(b"list") + array)
    if rng.random() < 0.1:
        pairs.append(pairs[rng.randrange(len(pairs))])
    tensors, at = [], 0
    names = [b"token_embd.weight", b"blk.0.attn_q.weight", b"blk.0.attn_k.weight", b"x"]
    for name in rng.sample(names, rng.randrange(1, 5)):
        name = name if rng.random() < 0.99 else b"x\xff"
        kind = rng.choice([0, 1, 2, 8, 12, 14, 30] if rng.random() < 0.97 else [99, 9, 5])
        dims = [rng.choice([256, 256, 256, 32, 0, 1]), rng.choice([8, 16, 8, 0, 1])]
        dims = dims[: rng.choice([2, 2, 2, 2, 1, 0])]
        dims = [odd(dim, 64) for dim in dims]
        told = struct.pack("<I", odd(len(dims), 32)) + b"".join(struct.pack("<Q", d) for d in dims)
        tensors.append(_text(name) + told + struct.pack("<IQ", kind, odd(at, 64)))
        at += rng.choice([16384, 16384, 16384, 16384, 32, 0])
    version = rng.choice([3, 3, 3, 2, odd(1, 32)])
    head = b"GGUF" + struct.pack("<IQQ", version, odd(len(tensors), 64), odd(len(pairs), 64))
    return (
        head
        + b"".join(pairs)
        + b"".join(tensors)
        + bytes(rng.choice([64, at + 64, at + 4096, at + 4096]))
    )


def flipped(data: bytes, rng: random.Random, times: int) -> bytes:
    """Overwrite a few bytes or words."""
    out = bytearray(data)
    for _ in range(times if out else 0):
        at = rng.randrange(len(out))
        if rng.random() < 0.5:
            out[at] = rng.randrange(256)
        else:
            size = rng.choice([2, 4, 8])
            word = (rng.choice(EXTREME) % (1 << 8 * size)).to_bytes(size, "little")
            out[at : at + size] = word[: len(out) - at]
    return bytes(out)


KINDS = {".safetensors": safetensors_file, ".pt": torch_file, ".gguf": gguf_file}


def make(seed: int) -> tuple[str, bytes]:
    """Return one broken (or, by luck, whole) file: its ending and its bytes."""
    rng = random.Random(seed)
    suffix = list(KINDS)[seed % len(KINDS)]
    data = KINDS[suffix](rng)
    damage = rng.randrange(8)
    if damage == 0:
        data = data[: rng.randrange(len(data) + 1)]
    elif damage == 1:
        data = flipped(data, rng, rng.randrange(1, 6))
    elif damage == 2:
        at = rng.randrange(len(data) + 1)
        data = data[:at] + rng.randbytes(rng.randrange(20)) + data[at:]
    elif damage == 3:
        at = rng.randrange(len(data) + 1)
        data = data[:at] + data[at + rng.randrange(20) :]
    return suffix, data


def try_file(path: Path) -> str:
    """Open a file and read from each of its tensors; return what came of it."""
    try:
        weights = Weights.open(path)
        repr(weights)
        for name, spec in weights.spec.items():
            source = weights.source(name)
            source.load(0, min(spec.size, 1000))
            source.load(max(spec.size - 1000, 0), spec.size)
    except PluribusError as error:
        str(error).encode()  # a message must be printable
        return type(error).__name__
    return "opened"


def run(seeds: range, folder: Path) -> tuple[Counter, float, list[int]]:
    """Try one file a seed; return outcomes, the slowest's seconds, and the seeds that failed."""
    seen: Counter = Counter()
    slowest, failed = 0.0, []
    for seed in seeds:
        suffix, data = make(seed)
        path = folder / f"x{suffix}"
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        began = time.perf_counter()
        try:
            seen[suffix, try_file(path)] += 1
        except Exception:
            traceback.print_exc()
            print(f"seed {seed}", file=sys.stderr)
            failed.append(seed)
        took = time.perf_counter() - began
        if took > 1:
            print(f"seed {seed} took {took:.1f} s", file=sys.stderr)
            failed.append(seed)
        slowest = max(slowest, took)
    return seen, slowest, failed


def main() -> int:
    """Run and report; the exit status is 1 if a file broke the rules."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(range(12), Path(folder))  # imports, so that memory below is that of files
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.perf_counter()
        found = run(range(options.seed, options.seed + options.n), Path(folder))
        seen, slowest, failed = found
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    for (suffix, what), count in sorted(seen.items()):
        print(f"{suffix:13} {what:14} {count}")
    print(
        f"{options.n} files in {time.perf_counter() - began:.0f} s, slowest {slowest:.3f} s, "
        f"peak memory grew by {grown:.0f} MB, {len(failed)} broke the rules {failed[:10]}"
    )
    return 1 if failed or grown > 300 else 0


if __name__ == "__main__":
    sys.exit(main())
