"""What `clmerge merge` should have written: an independent calculation, with nothing but json and numpy."""

import json
import re
import struct
from pathlib import Path

import numpy
import torch
from safetensors.torch import save

NUMPY = {
    "C64": "<c8",
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
    "F8_E4M3": "u1",
    "F8_E5M2": "u1",
}


def strict_safetensors(data):
    """Read a safetensors file by the letter of its specification, with json and numpy; raise if it is none."""
    size = struct.unpack("<Q", data[:8])[0]
    if size > 100_000_000 or 8 + size > len(data):
        raise ValueError("header length")
    text = data[8 : 8 + size].decode("utf-8")
    if not text.startswith("{"):
        raise ValueError("header must begin with {")

    def pairs(items):
        keys = [key for key, _ in items]
        if len(set(keys)) != len(keys):
            raise ValueError("duplicate keys")
        return dict(items)

    header = json.loads(text, object_pairs_hook=pairs)
    metadata = header.pop("__metadata__", None) or {}
    if any(not isinstance(v, str) for v in metadata.values()):
        raise ValueError("metadata must be strings")
    found, spans = {}, []
    for name, info in header.items():
        begin, end = info["data_offsets"]
        count = 1
        for side in info["shape"]:
            if isinstance(side, bool) or not isinstance(side, int) or side < 0:
                raise ValueError("shape")
            count *= side
        raw = data[8 + size + begin : 8 + size + end]
        if len(raw) != end - begin or begin < 0:
            raise ValueError("offsets")
        if info["dtype"] == "BF16":
            array = (numpy.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
        else:
            array = numpy.frombuffer(raw, NUMPY[info["dtype"]])
        if len(array) != count:
            raise ValueError("size")
        found[name] = (info["dtype"], array.reshape(info["shape"]))
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise ValueError("hole or overlap")
        position = end
    if position != len(data) - 8 - size:
        raise ValueError("trailing bytes")
    return found, metadata


def checked_result(case, out):
    if "wrote " not in out:
        return (
            ("ok", "nothing to write")
            if re.search(r"^memory |is what its ledger says", out, re.M)
            else ("wrong", "exit 0 and no result")
        )
    path = case.path(case.output)
    said = re.search(r"^wrote +(.+)$", out, re.M)
    if case.name == "mutated" and said and not path.exists():
        path = Path(said[1])  # what was changed is where it is written
    folder = case.path("outdir")
    if folder.is_dir():
        files = sorted(folder.glob("*.safetensors"))
    else:
        files = [path]
    try:
        result = {}
        for file in files:
            result |= strict_safetensors(file.read_bytes())[0]
    except (OSError, ValueError, KeyError, struct.error) as error:
        return "wrong", f"the output cannot be read: {error!r}"
    if not result:
        return "wrong", "no output"
    if not case.checked:
        return "ok", "unchecked"
    try:
        base = read_any(case.base)
        models = [read_any(model) for model in case.models]
    except Exception as error:
        return "accepted", f"not by the letter: {type(error).__name__} {str(error)[:60]}"
    if set(base) != set(result):
        return "wrong", f"names {sorted(set(base) ^ set(result))[:2]}"
    for name, (dtype, start) in base.items():
        merged = dtype in ("F64", "F32", "F16", "BF16")
        merged &= not name.endswith(("running_mean", "running_var"))
        merged &= all(
            name in m and m[name][1].shape == start.shape and m[name][0][0] in "FB" and m[name][0] != "BOOL"
            for m in models
        )
        want = start.astype("f8")
        if merged:
            with numpy.errstate(all="ignore"):
                want = want + sum(m[name][1].astype("f8") - start.astype("f8") for m in models)
        got = result[name][1].astype("f8")
        if not numpy.isfinite(got).all() and numpy.isfinite(start.astype("f8")).all() and merged:
            return "nan", f"{name} holds NaN or Inf"
        tolerance = {"F64": 1e-5, "F32": 1e-5, "F16": 1e-2, "BF16": 2e-2}.get(dtype, 0)
        if got.shape != want.shape:
            return "wrong", f"shape of {name}"
        with numpy.errstate(all="ignore"):
            scale = (
                numpy.abs(want).max() + sum(numpy.abs(m[name][1].astype("f8")).max() for m in models)
                if merged and want.size
                else 1.0
            )
            close = numpy.isclose(got, want, rtol=tolerance, atol=tolerance * scale, equal_nan=True).all()
        if not close:
            return "wrong", f"values of {name}"
    return "ok", "checked"


def read_any(path):
    if path.suffix == ".safetensors":
        return strict_safetensors(path.read_bytes())[0]
    loaded = torch.load(path, weights_only=True)
    loaded = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    return strict_safetensors(
        save({k: v.detach().contiguous() for k, v in loaded.items() if isinstance(v, torch.Tensor)})
    )[0]
