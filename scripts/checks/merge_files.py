"""Damaged and hostile checkpoints for `clmerge merge`: safetensors, torch.save, shards."""

import argparse
import importlib
import io
import json
import os
import pickle
import struct
import subprocess
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save

SOUND = {}


def use_sound_files(seed):
    """Make base and two models that the inputs are damaged copies of."""
    SOUND.update(sound_files(seed))


class Case:
    """One input: the options, what they are about, and whether a result can be checked."""

    def __init__(self, folder, rng):
        self.folder, self.rng = folder, rng
        self.name = ""
        self.names = []  # of files or options of which a message must name one
        self.argv = []
        self.checked = False  # TaskArithmetic of base and models, scale 1
        self.base, self.models = None, []
        self.output = "out.safetensors"

    def path(self, name):
        return self.folder / name

    def write(self, name, data):
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogateescape"))
        return path


def sound_files(seed):
    """Base and two models, as tensors and as bytes."""
    torch.manual_seed(seed)
    base = {
        "blocks.0.attn.weight": torch.randn(8, 6),
        "blocks.0.attn.bias": torch.randn(8),
        "blocks.1.mlp.weight": torch.randn(4, 8).to(torch.bfloat16),
        "head.weight": torch.randn(3, 4).to(torch.float16),
        "norm.running_mean": torch.randn(4),
        "steps": torch.tensor(7),
    }
    models = [
        {k: (v + 0.1 * torch.randn(v.shape).to(v.dtype) if v.is_floating_point() else v) for k, v in base.items()}
        for _ in range(2)
    ]
    return {"base": base, "models": models, "base_bytes": save(base), "model_bytes": [save(m) for m in models]}


def plain(case, *, victim="m1.safetensors", out=("--out", "out.safetensors")):
    """Write base and two sound models; the victim's content is to be replaced."""
    files = {
        "base.safetensors": SOUND["base_bytes"],
        "m0.safetensors": SOUND["model_bytes"][0],
        "m1.safetensors": SOUND["model_bytes"][1],
    }
    for name, data in files.items():
        case.write(name, data)
    case.base, case.models = case.path("base.safetensors"), [case.path("m0.safetensors"), case.path("m1.safetensors")]
    case.names = [victim]
    case.checked = True
    options(case, out)


def options(case, out=("--out", "out.safetensors"), merger=("--merger", "TaskArithmetic", "--merger.scale=1.0")):
    case.argv = ["--base", case.base, "--models", *case.models, *merger]
    if out:
        case.argv += [out[0], case.path(out[1])]


def header_and_data(data):
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def assembled(header, data, *, raw=None, size=None):
    text = raw if raw is not None else json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text) if size is None else size) + text + data


ODD = [
    None,
    True,
    -1,
    0,
    1.5,
    1e400,
    2**31,
    2**63,
    2**64,
    10**30,
    "",
    "3",
    "F32",
    [],
    [[]],
    {},
    {"a": 1},
    [2**62, 4],
    [0, 0],
    "\ud800",
    "a" * 70000,
]


def fuzz_safetensors(case):
    rng = case.rng
    victim = rng.choice(["base.safetensors", "m1.safetensors"])
    plain(case, victim=victim)
    data = SOUND["base_bytes"] if victim[0] == "b" else SOUND["model_bytes"][1]
    header, body = header_and_data(data)
    names = [n for n in header if n != "__metadata__"]
    one = rng.choice(names)
    kind = case.name = rng.choice(
        [
            "truncated",
            "flipped",
            "header_flip",
            "length",
            "overlap",
            "dtype",
            "shape",
            "offsets",
            "duplicate",
            "metadata",
            "hole",
            "trailing",
            "nonfinite",
            "name",
            "deep",
            "notjson",
            "empty",
            "odd",
            "swapped",
            "low_rank",
            "bank",
            "zeros",
            "alias",
            "extra",
            "nullshape",
            "hugeshape",
            "whitespace",
        ]
    )
    if kind == "truncated":
        data = data[: rng.choice([0, 1, 7, 8, 9, len(data) - 1, rng.randrange(len(data))])]
    elif kind == "flipped":
        data = bytearray(data)
        for _ in range(rng.choice([1, 2, 8])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        data = bytes(data)
    elif kind == "header_flip":
        data = bytearray(data)
        size = struct.unpack("<Q", data[:8])[0]
        for _ in range(rng.choice([1, 1, 2, 4])):
            data[8 + rng.randrange(size)] = rng.randrange(256)
        data = bytes(data)
    elif kind == "length":
        data = assembled(
            header,
            body,
            size=rng.choice(
                [0, 1, 2, 2**63, 2**64 - 1, 10**8, 10**8 + 1, len(data), len(data) - 8, rng.randrange(2**40)]
            ),
        )
    elif kind == "overlap":
        a, b = rng.sample(names, 2)
        header[a]["data_offsets"] = header[b]["data_offsets"]
        data = assembled(header, body)
    elif kind == "dtype":
        header[one]["dtype"] = rng.choice(
            [
                "F64",
                "F16",
                "BF16",
                "F4",
                "F8_E8M0",
                "U16",
                "U32",
                "U64",
                "XYZ",
                "",
                "f32",
                "I64",
                "BOOL",
                "C64",
                "F6_E2M3",
                3,
                None,
            ]
        )
        data = assembled(header, body)
    elif kind == "shape":
        header[one]["shape"] = rng.choice(
            [
                [],
                [-1],
                [48.0],
                ["8", "6"],
                [0],
                [6, 8],
                [48],
                [1, 48],
                [2**63, 2],
                [2**64],
                None,
                [None],
                [[8, 6]],
                [8] * 5000,
            ]
        )
        data = assembled(header, body)
    elif kind == "offsets":
        start, end = header[one]["data_offsets"]
        header[one]["data_offsets"] = rng.choice(
            [
                [end, start],
                [start],
                [start, end, 0],
                [-1, end],
                [start, 2**64],
                [start, len(body) + 8],
                [start + 1, end + 1],
                None,
                "0",
                [0.5, 1.5],
            ]
        )
        data = assembled(header, body)
    elif kind == "duplicate":
        text = json.dumps(header)[:-1] + ", " + json.dumps({one: header[rng.choice(names)]})[1:]
        data = assembled(None, body, raw=text.encode())
    elif kind == "metadata":
        header["__metadata__"] = rng.choice(
            [
                {"a": 1},
                {"a": None},
                [],
                "x",
                {"clmerge": "{"},
                {"format": "tf"},
                {"x": "y" * 10**6},
                {"task": "0", "name": "<script>", "base": ""},
                {"low_rank": "{}"},
            ]
        )
        data = assembled(header, body)
    elif kind == "hole":
        last = max(names, key=lambda n: header[n]["data_offsets"])
        header[last]["data_offsets"] = [x + 16 for x in header[last]["data_offsets"]]
        data = assembled(header, body + b"\0" * 16)
    elif kind == "trailing":
        data += bytes(rng.randrange(1, 64))
    elif kind == "nonfinite":
        tensors = {k: v.clone() for k, v in (SOUND["base"] if victim[0] == "b" else SOUND["models"][1]).items()}
        at = rng.choice([k for k in tensors if tensors[k].is_floating_point()])
        tensors[at].view(-1)[rng.randrange(tensors[at].numel())] = rng.choice(
            [float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e-45]
        )
        data = save(tensors)
    elif kind == "name":
        new = rng.choice(
            [
                "",
                " ",
                "../../x",
                "/etc/passwd",
                "a\0b",
                "x" * 10**6,
                "\ud800",
                "\u202e",
                "__metadata__",
                "<script>",
                "*",
                "[",
                "module.",
                "a\nb",
                "%s%n",
                "é" * 1000,
            ]
        )
        header[new] = header.pop(one)
        data = assembled(None, body, raw=json.dumps(header).encode("utf-8", "surrogatepass"))
    elif kind == "deep":
        text = rng.choice(
            [
                "[" * 100000,
                '{"a":' * 100000,
                '{"a":{"dtype":"F32","shape":' + "[" * 5000 + "]" * 5000 + ',"data_offsets":[0,0]}}',
                '{"__metadata__":' + '{"a":' * 3000 + "1" + "}" * 3000 + "}",
            ]
        )
        data = assembled(None, body, raw=text.encode())
    elif kind == "notjson":
        data = assembled(
            None,
            body,
            raw=rng.choice(
                [
                    b"",
                    b"null",
                    b"1",
                    b"[]",
                    b'"x"',
                    b"{",
                    b"\xff\xfe{}",
                    b" {}",
                    b"{}\0",
                    b"NaN",
                    b"PK\x03\x04",
                    b"\x80\x02}q\0.",
                ]
            ),
        )
    elif kind == "empty":
        data = rng.choice(
            [save({}), assembled({}, b""), assembled({"__metadata__": {}}, b""), save({"a": torch.zeros(0, 4)})]
        )
    elif kind == "odd":
        header[one][rng.choice(["dtype", "shape", "data_offsets", "more"])] = rng.choice(ODD)
        data = assembled(header, body)
    elif kind == "swapped":
        header[one], header[names[0]] = header[names[0]], header[one]
        data = assembled(header, body)
    elif kind == "low_rank":
        case.checked = False
        text = rng.choice(
            [
                "{",
                "[]",
                "null",
                "3",
                '{"x": 1}',
                json.dumps({one: 1.0}),
                json.dumps({one: "x"}),
                json.dumps({one: None}),
                '{"blocks.0.attn.weight": 1e999}',
                json.dumps({"w": 1.0}),
                json.dumps({"w": 1}),
            ]
        )
        tensors = {k: v for k, v in SOUND["models"][1].items()}
        rank = rng.choice([0, 1, 2])
        tensors["w/A"], tensors["w/B"] = (
            torch.randn(rank, 6),
            rng.choice([torch.randn(8, rank), torch.randn(8, rank + 1), torch.tensor(1.0), torch.zeros(0, rank)]),
        )
        data = save(tensors, metadata={"low_rank": text} | rng.choice([{}, {"task": "0", "name": "a", "base": ""}]))
    elif kind == "bank":
        case.checked = False
        metadata = {
            "task": rng.choice(["0", "-1", "x", ""]),
            "name": rng.choice(["", "a\nb", "\x1b[31mred", "x" * 10000]),
            "base": rng.choice(["", "abc", "0" * 64]),
        }
        data = save(SOUND["models"][1], metadata=metadata)
    elif kind == "zeros":
        data = save({k: torch.zeros_like(v) for k, v in SOUND["base"].items()})
    elif kind == "alias":
        case.checked = False
        tensors = dict(SOUND["models"][1])
        tensors.pop(one)
        data = save(tensors, metadata={one: rng.choice(["", one, "nothing", *names]), rng.choice(names): one})
    elif kind == "extra":
        data = save(dict(SOUND["models"][1]) | {f"more.{i}": torch.randn(2) for i in range(rng.choice([1, 200]))})
    elif kind == "nullshape":
        header[one]["shape"], header[one]["data_offsets"] = [2**40, 0], [0, 0]
        data = assembled(header, body)
    elif kind == "hugeshape":
        header["big"] = {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 2**64 - 4]}
        data = assembled(header, body)
    elif kind == "whitespace":
        data = assembled(None, body, raw=json.dumps(header).encode() + rng.choice([b" " * 9, b"\n\t", b"\0" * 8, b"x"]))
    case.write(victim, data)


class Gadget:
    """Runs a shell command when it is unpickled."""

    def __init__(self, kind="system"):
        self.kind = kind

    def __reduce__(self):
        line = f"touch {os.environ['FUZZ_CANARY']}"
        if self.kind == "system":
            return os.system, (line,)
        if self.kind == "exec":
            return eval, (f"__import__('os').system({line!r})",)
        if self.kind == "popen":
            return subprocess.check_call, (["sh", "-c", line],)
        return importlib.import_module, ("antigravity",)


def fuzz_torch(case):
    rng = case.rng
    suffix = rng.choice([".pt", ".pth", ".bin", ".ckpt", ".tar"])
    victim = f"m1{suffix}"
    plain(case, victim=victim)
    case.models[1] = case.path(victim)
    case.path("m1.safetensors").unlink()
    options(case)
    kind = case.name = rng.choice(
        [
            "sound",
            "truncated",
            "flipped",
            "gadget",
            "gadget_state",
            "legacy_gadget",
            "legacy",
            "loadgadget",
            "objects",
            "lightning",
            "nested",
            "zipnames",
            "zipbomb",
            "pickleops",
            "strided",
            "hugeview",
            "sparse",
            "quantized",
            "complex",
            "parameter",
            "badstorage",
            "notzip",
            "storagelie",
            "meta",
            "keys",
            "weightsonly",
            "jit",
            "laughs",
            "subclass",
            "dupzip",
        ]
    )
    state = dict(SOUND["models"][1])
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()

    def saved(value, **extra):
        buffer = io.BytesIO()
        torch.save(value, buffer, **extra)
        return buffer.getvalue()

    def rezipped(data, change, *, compression=zipfile.ZIP_STORED):
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", compression) as new:
            for info in old.infolist():
                for name, content in change(info.filename, old.read(info)):
                    new.writestr(name, content)
        return out.getvalue()

    if kind == "truncated":
        data = data[: rng.choice([0, 1, 4, len(data) - 1, len(data) - 22, rng.randrange(len(data))])]
    elif kind == "flipped":
        data = bytearray(data)
        for _ in range(rng.choice([1, 2, 8, 64])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        data = bytes(data)
    elif kind == "gadget":
        data = saved({"state_dict": state, "x": Gadget(rng.choice(["system", "exec", "popen", "import"]))})
    elif kind == "gadget_state":
        data = saved(dict(state) | {"evil": Gadget(rng.choice(["system", "exec", "popen"]))})
    elif kind == "legacy_gadget":
        data = rng.choice(
            [
                pickle.dumps(Gadget("system"), protocol=rng.choice([0, 2, 4])),
                saved({"a": Gadget("exec")}, _use_new_zipfile_serialization=False),
                b"cos\nsystem\n(S'touch " + os.environ["FUZZ_CANARY"].encode() + b"'\ntR.",
            ]
        )
    elif kind == "legacy":
        data = saved(state, _use_new_zipfile_serialization=False)
        if rng.random() < 0.7:
            data = data[: rng.randrange(len(data))]
    elif kind == "loadgadget":
        inner = case.write("inner.bin", pickle.dumps(Gadget("system")))
        ops = rng.choice(
            [
                b"\x80\x02ctorch.serialization\nload\nX"
                + struct.pack("<I", len(str(inner)))
                + str(inner).encode()
                + b"\x85R.",
                b"\x80\x02ctorch\nload\n(X" + struct.pack("<I", len(str(inner))) + str(inner).encode() + b"tR.",
                b"\x80\x02ctorch.hub\nload_state_dict_from_url\nX\x10\0\0\0http://127.0.0.1\x85R.",
                b"\x80\x02ctorch.jit\nload\nX" + struct.pack("<I", len(str(inner))) + str(inner).encode() + b"\x85R.",
                b"\x80\x02cbuiltins\ngetattr\nctorch\nload\nX\x08\0\0\0__call__\x86R.",
                b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(ctorch\nTensor\nK\0\x85X\x01\0\0\0btR.",
            ]
        )
        data = rezipped(data, lambda n, c: [(n, ops if n.endswith("data.pkl") else c)])
    elif kind == "objects":
        data = saved(
            rng.choice(
                [
                    [],
                    3,
                    None,
                    "x",
                    torch.ones(3),
                    [torch.ones(2)],
                    {},
                    {1: torch.ones(2)},
                    {"a": {"b": {"c": torch.ones(2)}}},
                    {"state_dict": []},
                    {"model": None},
                    {"state_dict": {"a": 1}},
                    set(),
                    {"model": {"model": state}},
                ]
            )
        )
        case.checked = False
    elif kind == "lightning":
        content = rng.choice([state, {f"model.{k}": v for k, v in state.items()}, {}, None, [], {"a": {}}, {1: 2}])
        data = saved(
            {
                "pytorch-lightning_version": rng.choice(["2.6.0", None, 3]),
                "state_dict": content,
                "hyper_parameters": rng.choice([{}, {"x": 1}, Gadget("system")]),
            }
        )
        case.checked = False
    elif kind == "nested":
        deep = state
        for _ in range(rng.choice([1, 50, 200])):
            deep = {rng.choice(["state_dict", "model", "module", "weights", "x"]): deep}
        data, case.checked = saved(deep), False
    elif kind == "zipnames":
        data = rezipped(
            data,
            lambda n, c: [
                (rng.choice([n.replace("archive", "../../evil"), "/" + n, n.upper(), n.replace("data/", "data\\")]), c)
            ],
        )
    elif kind == "zipbomb":
        big = b"\x80\x02" + b"N0" * (50 << 20) + b"}."
        data = rezipped(
            data, lambda n, c: [(n, big if n.endswith("data.pkl") else c)], compression=zipfile.ZIP_DEFLATED
        )
    elif kind == "pickleops":
        ops = rng.choice(
            [
                b"\x80\x02" + b"(" * 100000 + b".",
                b"\x80\x02]" + b"2a" * 2000 + b".",
                b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".",
                b"\x80\x02\x8b\xff\xff\xff\x7f.",
                b"",
                b".",
                b"\x80\x02}q\0(h\0h\0u.",
                b"\x80\x02X\xff\xff\xff\x7fa.",
                b"\x80\x02j\xff\xff\xff\x7f.",
                b"\x80\xff.",
                bytes(rng.randrange(256) for _ in range(60)),
            ]
        )
        data = rezipped(data, lambda n, c: [(n, ops if n.endswith("data.pkl") else c)])
    elif kind == "strided":
        data = saved({k: (v.t().contiguous().t() if v.dim() == 2 else v) for k, v in state.items()})
    elif kind == "hugeview":
        side = rng.choice([10**5, 10**7])
        name = rng.choice(["blocks.0.attn.weight", "more"])
        data = saved(dict(state) | {name: torch.zeros(1).expand(side, side)})
        case.checked = False
    elif kind == "sparse":
        data, case.checked = (
            saved(
                dict(state)
                | {"blocks.0.attn.weight": rng.choice([torch.eye(8, 6).to_sparse(), torch.eye(8, 6).to_sparse_csr()])}
            ),
            False,
        )
    elif kind == "quantized":
        data, case.checked = (
            saved(
                dict(state)
                | {"blocks.0.attn.weight": torch.quantize_per_tensor(torch.randn(8, 6), 0.1, 0, torch.qint8)}
            ),
            False,
        )
    elif kind == "complex":
        data = saved(
            dict(state)
            | {"blocks.0.attn.weight": torch.randn(8, 6, dtype=rng.choice([torch.complex64, torch.complex128]))}
        )
        case.checked = False
    elif kind == "parameter":
        data = saved({k: torch.nn.Parameter(v, requires_grad=v.is_floating_point()) for k, v in state.items()})
    elif kind == "badstorage":
        data = rezipped(data, lambda n, c: [(n, c[: rng.randrange(len(c) + 1)] if "/data/" in n else c)])
    elif kind == "notzip":
        data = rng.choice(
            [
                b"PK\x03\x04",
                b"PK\x05\x06" + b"\0" * 18,
                b"\x1f\x8b",
                SOUND["base_bytes"],
                b"hello\n",
                b"\0" * 5000,
                b"<html>404</html>",
            ]
        )
    elif kind == "storagelie":
        pick = [b"FloatStorage", b"DoubleStorage", b"HalfStorage"]
        data = rezipped(
            data, lambda n, c: [(n, c.replace(pick[0], rng.choice(pick[1:])) if n.endswith("data.pkl") else c)]
        )
        case.checked = False
    elif kind == "meta":
        data, case.checked = saved(dict(state) | {"blocks.0.attn.weight": torch.empty(8, 6, device="meta")}), False
    elif kind == "keys":
        data, case.checked = (
            saved(dict(state) | {rng.choice([None, 3, ("a", "b"), b"x", "\ud800", "a\0", "x" * 10**5]): torch.ones(2)}),
            False,
        )
    elif kind == "weightsonly":
        data = saved(dict(state) | {"ns": argparse.Namespace(a=1), "p": Path("x")})
    elif kind == "jit":
        module = torch.jit.script(torch.nn.Linear(2, 2))
        buffer = io.BytesIO()
        torch.jit.save(module, buffer)
        data, case.checked = buffer.getvalue(), False
    elif kind == "laughs":
        key = ("x",)
        for _ in range(22):
            key = (key, key)
        data, case.checked = saved({"a": key, "b": [key]}), False
    elif kind == "subclass":
        data = saved(torch.nn.Linear(2, 2))
    elif kind == "dupzip":
        data = rezipped(
            data, lambda n, c: [(n, c), (n, pickle.dumps(Gadget("system"), 2))] if n.endswith("data.pkl") else [(n, c)]
        )
    case.write(victim, data)
    if kind in ("gadget", "gadget_state", "weightsonly", "subclass"):
        case.checked = False


def fuzz_index(case):
    rng = case.rng
    plain(case)
    case.checked = False
    case.path("m1.safetensors").unlink()
    folder = case.path("hf")
    folder.mkdir()
    state = SOUND["models"][1]
    half = list(state)[:3]
    case.write("hf/model-00001-of-00002.safetensors", save({k: state[k] for k in half}))
    case.write("hf/model-00002-of-00002.safetensors", save({k: v for k, v in state.items() if k not in half}))
    weights = {k: f"model-0000{1 if k in half else 2}-of-00002.safetensors" for k in state}
    case.write("secret.safetensors", save({"secret": torch.ones(2)}))
    case.names = ["hf"]
    index = {"metadata": {"total_size": 1}, "weight_map": weights}
    name = "model.safetensors.index.json"
    one = rng.choice(list(weights))
    kind = case.name = rng.choice(
        [
            "sound",
            "parent",
            "absolute",
            "symlink",
            "missing",
            "types",
            "garbage",
            "twice",
            "selfref",
            "mixed",
            "nul",
            "many",
            "wrongfile",
            "bin",
            "fifo",
            "dirshard",
            "metadata",
            "deep",
            "dots",
        ]
    )
    if kind == "parent":
        weights[one] = rng.choice(
            ["../secret.safetensors", "../m0.safetensors", "./../secret.safetensors", "x/../../secret.safetensors"]
        )
    elif kind == "absolute":
        weights[one] = rng.choice(
            [str(case.path("secret.safetensors")), "/etc/passwd", "/dev/zero", "/proc/self/environ"]
        )
    elif kind == "symlink":
        (folder / "link.safetensors").symlink_to(
            rng.choice(
                [
                    "../secret.safetensors",
                    "link.safetensors",
                    "nothing",
                    "/dev/zero",
                    "model-00001-of-00002.safetensors",
                ]
            )
        )
        weights[one] = "link.safetensors"
    elif kind == "missing":
        weights[one] = "model-00009-of-00002.safetensors"
    elif kind == "types":
        index["weight_map"] = rng.choice(
            [None, [], ["a"], "x", 3, {}, {one: 3}, {one: None}, {one: ["a"]}, {one: {}}, {one: True}]
        )
    elif kind == "garbage":
        index = None
    elif kind == "twice":
        case.write("hf/model-00002-of-00002.safetensors", save(dict(state)))
    elif kind == "selfref":
        weights[one] = name
    elif kind == "mixed":
        buffer = io.BytesIO()
        torch.save({one: state[one]}, buffer)
        case.write("hf/x.bin", buffer.getvalue())
        weights[one] = "x.bin"
    elif kind == "nul":
        weights[one] = rng.choice(["a\0b", "", ".", "..", "a" * 5000, "\ud800", "model-00001-of-00002.safetensors\0"])
    elif kind == "many":
        weights |= {f"w{i}": f"f{i}.safetensors" for i in range(20000)}
    elif kind == "wrongfile":
        weights[one] = "model-00002-of-00002.safetensors" if one in half else "model-00001-of-00002.safetensors"
    elif kind == "bin":
        name = "pytorch_model.bin.index.json"
    elif kind == "fifo":
        os.mkfifo(folder / "fifo.safetensors")
        weights[one] = "fifo.safetensors"
    elif kind == "dirshard":
        (folder / "d.safetensors").mkdir()
        weights[one] = "d.safetensors"
    elif kind == "metadata":
        index["metadata"] = rng.choice([None, [], "x", {"clmerge": 3}, {"total_size": "x"}])
    elif kind == "dots":
        weights[one] = "./" + weights[one]
    text = (
        json.dumps(index)
        if index is not None
        else rng.choice(
            ["", "{", "null", "[]", "\ufeff{}", '{"weight_map": {' + '"a":' * 1000, "[" * 100000, '{"weight_map": NaN}']
        )
    )
    if kind == "deep":
        text = '{"weight_map": ' + '{"a":' * rng.choice([500, 50000]) + "1" + "}" * 500 + "}"
    case.write(f"hf/{name}", text if kind != "garbage" or rng.random() < 0.7 else b"\xff\xfe\0")
    case.models[1] = folder / name if rng.random() < 0.3 else folder
    options(case)
