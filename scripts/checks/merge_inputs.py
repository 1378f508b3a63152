"""Damaged and hostile paths, recipes, adapters, folders, ledgers and options for `clmerge merge`."""

import io
import json
import os
import shutil
import socket
from pathlib import Path

import torch
import yaml
from merge_files import (
    ODD,
    SOUND,
    Gadget,
    assembled,
    fuzz_index,
    fuzz_safetensors,
    fuzz_torch,
    header_and_data,
    options,
    plain,
)
from merge_process import captured
from safetensors.torch import save

from clmerge.cli import main as command
from clmerge.weights import fingerprint


def fuzz_paths(case):
    rng = case.rng
    plain(case)
    victim = case.path("m1.safetensors")
    kind = case.name = rng.choice(
        [
            "loop",
            "dangling",
            "link",
            "devzero",
            "devnull",
            "fifo",
            "directory",
            "socket",
            "noexist",
            "nul",
            "long",
            "outlink",
            "outdir",
            "outdev",
            "outinput",
            "outsame",
            "outfifo",
            "outmissing",
            "emptyfolder",
            "folder2",
            "outexists",
            "nosuffix",
            "proc",
            "home",
            "glob",
            "dash",
            "newline",
            "twins",
            "basemodel",
            "outbase",
            "outdirfile",
            "outnul",
        ]
    )
    if kind == "loop":
        victim.unlink(), victim.symlink_to("m1.safetensors")
    elif kind == "dangling":
        victim.unlink(), victim.symlink_to("nothing")
    elif kind == "link":
        victim.rename(case.path("real.safetensors")), victim.symlink_to("real.safetensors")
    elif kind in ("devzero", "devnull", "proc"):
        (
            victim.unlink(),
            victim.symlink_to(
                {
                    "devzero": rng.choice(["/dev/zero", "/dev/urandom", "/dev/full"]),
                    "devnull": "/dev/null",
                    "proc": rng.choice(["/proc/self/mem", "/proc/self/maps", "/proc/kmsg"]),
                }[kind]
            ),
        )
    elif kind == "fifo":
        name = rng.choice(["m1.safetensors", "m1.pt", "m1.ckpt"])
        victim.unlink(), os.mkfifo(case.path(name))
        case.models[1], case.names = case.path(name), [name]
        options(case)
    elif kind == "directory":
        victim.unlink(), victim.mkdir()
    elif kind == "socket":
        victim.unlink()
        cwd = Path.cwd()
        os.chdir(case.folder)
        with socket.socket(socket.AF_UNIX) as one:
            one.bind("m1.safetensors")
        os.chdir(cwd)
    elif kind == "noexist":
        case.models[1] = case.path(rng.choice(["nope.safetensors", "no/where.pt", "m2.safetensors"]))
        case.names = [case.models[1].name]
        options(case)
    elif kind in ("nul", "long"):
        case.models[1] = Path(
            str(case.folder) + "/" + rng.choice(["a\0b.safetensors", "x" * 300 + ".safetensors", "y/" * 3000 + "x.pt"])
        )
        case.names = []
        options(case)
    elif kind == "outlink":
        case.path("out.safetensors").symlink_to(
            rng.choice(["m0.safetensors", "nothing", "base.safetensors", "out.safetensors", "/dev/null"])
        )
        case.names = ["out.safetensors", "m0.safetensors", "base.safetensors"]
        case.argv += rng.choice([[], ["--overwrite"]])
    elif kind == "outdir":
        case.path("out.safetensors").mkdir()
        case.argv += rng.choice([[], ["--overwrite"]])
        case.names = ["out.safetensors"]
    elif kind == "outdev":
        case.argv[-1] = rng.choice(
            ["/dev/null", "/dev/full", "/proc/x.safetensors", "/dev/null/x.safetensors", "/sys/x.safetensors"]
        )
        case.argv += rng.choice([[], ["--overwrite"]])
        case.names = [case.argv[-1] if case.argv[-1] != "--overwrite" else case.argv[-2]]
    elif kind in ("outinput", "outbase"):
        case.argv[-1] = case.path("m0.safetensors" if kind == "outinput" else "base.safetensors")
        case.argv += ["--overwrite"]
        case.names = [case.argv[-2].name]
    elif kind == "outsame":
        case.argv[-1] = f"{case.folder}/./x/../m0.safetensors"
        case.argv += ["--overwrite"]
        case.names = ["m0.safetensors"]
    elif kind == "outfifo":
        os.mkfifo(case.path("out.safetensors"))
        case.argv += ["--overwrite"]
        case.names = ["out.safetensors"]
    elif kind == "outmissing":
        case.argv[-1] = rng.choice(
            [
                case.path("m0.safetensors") / "x.safetensors",
                case.path("out.txt"),
                case.path(""),
                Path(),
                Path(str(case.folder) + "/" + "x" * 300 + ".safetensors"),
            ]
        )
        case.names = []
    elif kind == "emptyfolder":
        case.path("e").mkdir()
        case.models[1], case.names = case.path("e"), ["case/e"]
        options(case)
    elif kind == "folder2":
        case.write("e/a.safetensors", SOUND["model_bytes"][1]), case.write("e/b.pt", b"x")
        case.models[1], case.names = case.path("e"), ["case/e"]
        options(case)
    elif kind == "outexists":
        case.write("out.safetensors", b"precious")
        case.names = ["out.safetensors"]
    elif kind == "nosuffix":
        victim.rename(case.path("m1"))
        case.models[1], case.names = case.path("m1"), ["case/m1"]
        options(case)
    elif kind == "home":
        case.models[1], case.names = Path("~/x.safetensors"), ["x.safetensors"]
        options(case)
    elif kind == "glob":
        case.models[1], case.names = case.path("*.safetensors"), ["*.safetensors"]
        options(case)
    elif kind == "dash":
        case.argv = [
            "--base",
            "-",
            "--models",
            "-",
            "--merger",
            "TaskArithmetic",
            "--out",
            case.path("out.safetensors"),
        ]
        case.names, case.checked = [], False
    elif kind == "newline":
        victim.rename(case.path("m\n\x1b[31m1.safetensors"))
        case.models[1] = case.path("m\n\x1b[31m1.safetensors")
        options(case)
    elif kind == "twins":
        case.models = [case.models[0]] * rng.choice([2, 50])
        options(case)
    elif kind == "basemodel":
        case.models = [case.base] * 2
        options(case)
    elif kind == "outdirfile":
        case.write("outdir/notes.txt", "keep")
        case.argv[-1] = case.path("outdir")
        case.argv += [
            "--shard-size",
            rng.choice(["100", "1B", "5GB", "0", "-1", "1e9", "9" * 400, "1" * 400 + "GB", "٣GB", "", "GB", "1 TB"]),
        ]
        case.names, case.checked = ["shard", "size", "outdir"], True
    elif kind == "outnul":
        case.argv[-1] = str(case.folder) + rng.choice(
            ["/a\0.safetensors", "/\ud800.safetensors", "/\n.safetensors", "/ .safetensors", "/.safetensors"]
        )
        case.names, case.checked = [], False
        case.output = case.argv[-1].rpartition("/")[2]


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)


def fuzz_recipe(case):
    rng = case.rng
    plain(case, victim="recipe.yaml")
    case.checked = False
    recipe = {
        "base": str(case.base), "models": [str(m) for m in case.models], "out": str(case.path("out.safetensors")),
        "merger": {"class_path": "TaskArithmetic", "init_args": {"scale": 1.0}},
    }  # fmt: skip
    kind = case.name = rng.choice(
        [
            "sound",
            "laughs",
            "python",
            "types",
            "unknown",
            "class_path",
            "init_args",
            "groups",
            "dtype",
            "patterns",
            "mutated",
            "deep",
            "alias",
            "tags",
            "merge_keys",
            "dates",
            "binary",
            "include_glob",
            "threads",
            "empty",
            "json",
            "recursion",
            "hugeint",
            "multi",
            "groups_odd",
            "origin",
            "nonutf",
            "interpolation",
            "verify",
        ]
    )
    text = None
    if kind == "laughs":
        text = LAUGHS + rng.choice(
            [
                "",
                "base: *j\n",
                "models: *j\n",
                "groups: *j\n",
                "merger: *j\n",
                "include: *j\n",
                "merge_method: linear\nmodels: *j\n",
                "? *j\n: 1\n",
            ]
        )
    elif kind == "python":
        line = f"touch {os.environ['FUZZ_CANARY']}"
        evil = rng.choice(
            [
                f"!!python/object/apply:os.system ['{line}']",
                f"!!python/object/apply:subprocess.check_call [[sh, -c, '{line}']]",
                "!!python/name:os.system",
                "!!python/module:antigravity",
                "!!python/object/new:os.system ['x']",
                f"!!python/object/apply:eval [\"__import__('os').system('{line}')\"]",
            ]
        )
        recipe[rng.choice(list(recipe))] = "EVIL"
        text = yaml.safe_dump(recipe).replace("EVIL", evil)
    elif kind == "types":
        recipe[
            rng.choice(
                [
                    *recipe,
                    "include",
                    "exclude",
                    "groups",
                    "dtype",
                    "origin",
                    "threads",
                    "strict",
                    "shard_size",
                    "shard-size",
                    "overwrite",
                    "no_hash",
                    "dry_run",
                ]
            )
        ] = rng.choice([*[x for x in ODD if x != "\ud800"], [1, 2], [None], [[["a"]]], "nan", float("nan"), -5])
    elif kind == "unknown":
        recipe[
            rng.choice(
                ["basee", "", "recipe", "config", "help", "print_config", "__class__", "merger.scale", "1", "verify"]
            )
        ] = rng.choice([1, "x", None, str(case.path("recipe.yaml"))])
    elif kind == "class_path":
        recipe["merger"] = {
            "class_path": rng.choice(
                [
                    "os.system",
                    "subprocess.Popen",
                    "builtins.eval",
                    "builtins.exec",
                    "importlib.import_module",
                    "Merger",
                    "clmerge.merging.Merger",
                    "clmerge.merging",
                    "torch.nn.Linear",
                    "antigravity.x",
                    "",
                    ".",
                    "a.b.c",
                    "TaskArithmetic.x",
                    "MagMax\n",
                    3,
                    None,
                    ["MagMax"],
                    "runpy.run_path",
                    "clmerge.merging.merger.Merger",
                    "torch.load",
                    "nt.system",
                ]
            ),
            "init_args": rng.choice(
                [{}, {"command": f"touch {os.environ['FUZZ_CANARY']}"}, {"args": ["touch", os.environ["FUZZ_CANARY"]]}]
            ),
        }
    elif kind == "init_args":
        recipe["merger"] = {
            "class_path": rng.choice(
                [
                    "TaskArithmetic",
                    "TIES",
                    "DARE",
                    "MagMax",
                    "WeightedAverage",
                    "Pipeline",
                    "GreedySoup",
                    "PAINT",
                    "Fisher",
                    "RegMean",
                    "TSVM",
                    "OPCM",
                    "SLERP",
                    "EMR",
                    "TALL",
                    "DELLA",
                    "Breadcrumbs",
                    "IsoC",
                    "KnOTS",
                    "WUDI",
                ]
            ),
            "init_args": {
                rng.choice(
                    [
                        "scale",
                        "density",
                        "seed",
                        "weights",
                        "trim",
                        "merge",
                        "rule",
                        "share",
                        "rank",
                        "steps",
                        "x",
                        "gamma",
                        "iterations",
                        "lr",
                    ]
                ): rng.choice(
                    [
                        *[x for x in ODD if x != "\ud800"],
                        0.5,
                        -0.5,
                        2,
                        float("nan"),
                        float("inf"),
                        -float("inf"),
                        1e308,
                        [0.1, 0.2],
                        [0.1],
                        "MagMax",
                        {"class_path": "MagMax"},
                    ]
                )
            },
        }
    elif kind == "groups":
        recipe["groups"] = [
            {
                "match": rng.choice(
                    [["*attn*"], ["nothing"], [], ["["], [""], ["*"], ["*" * 3000 + "b"], [1], None, "x", [["a"]]]
                ),
                "merger": rng.choice(
                    [
                        None,
                        "MagMax",
                        {"class_path": "MagMax"},
                        {"class_path": "TIES", "init_args": {"density": 2}},
                        3,
                        "os.system",
                    ]
                ),
            }
        ]
    elif kind == "groups_odd":
        recipe["groups"] = rng.choice(
            [
                3,
                "x",
                {},
                [None],
                [[]],
                [{}],
                [{"x": 1}],
                ["MagMax"],
                [{"match": ["*"]}] * 2000,
                {"match": ["*"], "merger": None},
            ]
        )
    elif kind == "dtype":
        recipe["dtype"] = rng.choice(
            [
                "bfloat16",
                "float64",
                "float8_e4m3fn",
                "float8_e5m2",
                "int8",
                "complex64",
                "x",
                "",
                "torch.float32",
                "F32",
                3,
                None,
                ["float32"],
                "load",
                "__class__",
            ]
        )
    elif kind in ("patterns", "include_glob"):
        recipe[rng.choice(["include", "exclude"])] = rng.choice(
            [
                ["["],
                ["*a" * 30 + "b"],
                ["**" * 500],
                ["[!" * 50],
                ["[z-a]"],
                ["\0"],
                [""],
                ["*"],
                [".*"],
                ["(?P<x>"],
                ["\\"],
                ["*" * 100000],
            ]
        )
    elif kind == "mutated":
        raw = bytearray(yaml.safe_dump(recipe).encode())
        for _ in range(rng.choice([1, 2, 5])):
            at = rng.randrange(len(raw))
            new = [[rng.randrange(256)], [], [rng.choice(b"{}[]:,&*!|>'\"%@`#-? \n\t\0"), raw[at]]]
            raw[at : at + 1] = bytes(rng.choice(new))
        text = bytes(raw)
    elif kind == "deep":
        n = rng.choice([100, 2000, 20000])
        text = rng.choice(
            [
                "merger: " + "[" * n,
                "a: " + "{a: " * n,
                "- " * n,
                "merger: " + "[" * n + "]" * n,
                "groups:\n" + "".join(" " * i + "- a:\n" for i in range(1, 200)),
            ]
        )
    elif kind == "alias":
        text = rng.choice(["base: &a [*a]\nmodels: *a\n", "&a {base: *a}\n", "base: *nothing\n", "a: &a b\n<<: *a\n"])
    elif kind == "tags":
        text = yaml.safe_dump(recipe).replace(
            "TaskArithmetic",
            rng.choice(
                [
                    "!!binary aaaa",
                    "!!set {a}",
                    "!!omap [a: 1]",
                    "!unknown x",
                    "!!timestamp 2020-01-01",
                    "!!float x",
                    "!!int x",
                    "!!bool x",
                    "!!null x",
                ]
            ),
        )
    elif kind == "merge_keys":
        text = yaml.safe_dump(recipe) + rng.choice(
            ["<<: {base: x}\n", "<<: [1]\n", "base: again\n", "---\nbase: x\n", "...\n", "%YAML 9.9\n---\n"]
        )
    elif kind == "dates":
        recipe[rng.choice(list(recipe))] = rng.choice(
            ["2020-01-01", 1e-5, "1e-5", "yes", "0x1f", "1:30:00", "~", "null", ".inf", "1_000"]
        )
        text = yaml.safe_dump(recipe).replace("'", "")
    elif kind == "binary":
        text = rng.choice(
            [
                b"\xff\xfe\0\0",
                b"\0",
                SOUND["base_bytes"],
                b"\x80abc: 1",
                b"PK\x03\x04",
                "base: \ud800".encode("utf-8", "surrogatepass"),
            ]
        )
    elif kind == "threads":
        recipe["threads"] = rng.choice([0, -1, 2**31, 2**63, 10**30, 1.5, "x", True, None, 64])
    elif kind == "empty":
        text = rng.choice(["", "\n", "#\n", "null\n", "[]\n", "{}\n", "3\n", "x\n", "- a\n"])
    elif kind == "json":
        text = json.dumps(recipe) + rng.choice(["", "x", "}", "\n{}"])
    elif kind == "recursion":
        recipe["recipe"] = str(case.path("recipe.yaml"))
    elif kind == "hugeint":
        text = yaml.safe_dump(recipe) + f"threads: {'9' * rng.choice([20, 5000])}\n"
    elif kind == "multi":
        text = yaml.safe_dump(recipe) + "---\n" + yaml.safe_dump(recipe)
    elif kind == "origin":
        recipe["origin"] = rng.choice(["zero", "base", "x", None, 3])
    elif kind == "nonutf":
        text = yaml.safe_dump(recipe).encode("utf-16")
    elif kind == "interpolation":
        recipe[rng.choice(list(recipe))] = rng.choice(
            [
                "${oc.env:HOME}",
                "${base}",
                "$HOME/x",
                "{{7*7}}",
                "%(x)s",
                "$(touch $FUZZ_CANARY)",
                "`touch $FUZZ_CANARY`",
                "; touch $FUZZ_CANARY",
            ]
        )
    elif kind == "verify":
        recipe = {"verify": rng.choice([str(case.base), "x", 3, None])}
    if text is None:
        text = yaml.safe_dump(recipe)
    case.write("recipe.yaml", text)
    case.names = []  # a message about an option may name the option
    case.argv = rng.choice([["--recipe", case.path("recipe.yaml")], [f"--recipe={case.path('recipe.yaml')}"]])
    if rng.random() < 0.05:
        case.argv = ["--recipe", text.decode("latin-1") if isinstance(text, bytes) else text]


def fuzz_mergekit(case):
    rng = case.rng
    plain(case, victim="recipe.yaml")
    case.checked = False
    method = rng.choice(
        [
            "linear",
            "slerp",
            "nuslerp",
            "task_arithmetic",
            "ties",
            "dare_linear",
            "dare_ties",
            "della",
            "della_linear",
            "breadcrumbs",
            "breadcrumbs_ties",
            "model_stock",
            "sce",
            "passthrough",
            "karcher",
            "x",
            None,
            3,
            ["ties"],
            {"a": 1},
        ]
    )
    names = ["weight", "density", "lambda", "normalize", "rescale", "gamma", "epsilon", "t", "int8_mask", "x"]
    values = [
        1.0,
        0.5,
        0,
        -1,
        2,
        "x",
        None,
        True,
        [0, 1],
        [0, 0.5, 1],
        [],
        [[1]],
        [{"filter": "attn", "value": 0.3}, {"value": 1}],
        [{"filter": 3, "value": 1}],
        [{"x": 1}],
        [{"filter": "attn"}],
        float("nan"),
        float("inf"),
        1e308,
        {"filter": "attn", "value": 1},
        "1e-5",
        [1, "x"],
        {},
        [None],
        10**400,
    ]

    def settings():
        return {rng.choice(names): rng.choice(values) for _ in range(rng.choice([0, 1, 1, 2]))}

    recipe = {
        "merge_method": method,
        "base_model": str(case.base),
        "models": [{"model": str(m), "parameters": {"weight": 0.5} | settings()} for m in case.models],
        "parameters": settings(),
    }
    kind = case.name = rng.choice(["sound", "settings", "slices", "models", "base", "odd", "dtype", "extra", "adapter"])
    if kind == "slices":
        recipe["slices"] = rng.choice(
            [
                [{"sources": [{"model": str(m), "layer_range": [0, 2]} for m in case.models]}],
                [],
                None,
                3,
                [3],
                [{}],
                [{"sources": 3}],
                [{"sources": []}],
                [
                    {
                        "sources": [
                            {
                                "model": str(case.base),
                                "layer_range": rng.choice([[0, 1], 3, "x", [0], None, [None, None]]),
                            }
                        ]
                    }
                ],
                {"a": 1},
            ]
        )
        if rng.random() < 0.7:
            recipe.pop("models")
    elif kind == "models":
        recipe["models"] = rng.choice(
            [
                None,
                [],
                3,
                "x",
                [3],
                [None],
                [{}],
                [{"model": 3}],
                [{"model": None}],
                [{"model": str(case.base), "parameters": 3}],
                {"model": str(case.base)},
                [{"model": "a/b-7B"}],
                [str(case.base)],
                [{"model": {"path": str(case.base)}}],
            ]
        )
    elif kind == "base":
        recipe["base_model"] = rng.choice([None, 3, "", "nothing", [], {}, str(case.folder), "mistralai/Mistral-7B"])
    elif kind == "odd":
        recipe[rng.choice([*recipe, "tokenizer_source", "chat_template", "modules", "slices", "out_dtype"])] = (
            rng.choice([x for x in ODD if x != "\ud800"])
        )
    elif kind == "dtype":
        recipe[rng.choice(["dtype", "out_dtype"])] = rng.choice(
            ["bfloat16", "x", 3, None, [], "torch.float16", "int8", {}]
        )
    elif kind == "extra":
        recipe[rng.choice(["tokenizer", "chat_template", "x", "out", 3, None, "trust_remote_code"])] = rng.choice(
            [1, None, {}]
        )
    elif kind == "adapter":
        recipe["models"][0]["model"] = rng.choice(
            [
                f"{case.base}+{case.models[0]}",
                f"{case.base}+nothing",
                "+",
                "a+b",
                f"{case.models[0]}+{case.models[1]}",
                f"{case.base}+",
            ]
        )
    try:
        text = yaml.safe_dump(recipe)
    except yaml.YAMLError:
        text = "merge_method: ties\n"
    case.write("recipe.yaml", text)
    case.argv = ["--recipe", case.path("recipe.yaml"), "--out", case.path("out.safetensors")]
    case.names = []


def fuzz_peft(case):
    rng = case.rng
    plain(case, victim="adapter")
    case.checked = False
    case.path("m1.safetensors").unlink()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["attn"], "task_type": None}
    tensors = {
        "base_model.model.blocks.0.attn.lora_A.weight": torch.randn(2, 6),
        "base_model.model.blocks.0.attn.lora_B.weight": torch.randn(8, 2),
    }
    kind = case.name = rng.choice(
        [
            "sound",
            "garbage",
            "missing",
            "peft_type",
            "r",
            "alpha",
            "patterns",
            "regex",
            "flags",
            "odd",
            "refused",
            "factors",
            "shapes",
            "names",
            "both",
            "bin",
            "huge",
            "nan",
            "rslora",
            "noconfig",
            "init",
            "deep",
            "factors",
            "shapes",
            "names",
            "both",
            "bin",
            "huge",
            "nan",
            "rslora",
            "noconfig",
            "init",
            "deep",
            "r",
            "alpha",
            "patterns",
            "flags",
            "odd",
        ]
    )
    text = None
    if kind == "garbage":
        text = rng.choice(
            [
                "",
                "{",
                "null",
                "[]",
                "3",
                '"x"',
                b"\xff\xfe",
                "[" * 100000,
                "NaN",
                '{"peft_type": "LORA"}',
                '{"r": 1, "lora_alpha": 1}',
            ]
        )
    elif kind == "missing":
        config.pop(rng.choice(list(config)))
    elif kind == "peft_type":
        config["peft_type"] = rng.choice(["IA3", None, 3, "lora", [], {}])
    elif kind in ("r", "alpha"):
        config["r" if kind == "r" else "lora_alpha"] = rng.choice(
            [*[x for x in ODD if x != "\ud800"], float("nan"), float("inf"), -2, 2.0, "2"]
        )
    elif kind == "patterns":
        config[rng.choice(["rank_pattern", "alpha_pattern"])] = rng.choice(
            [
                *[x for x in ODD if x != "\ud800"],
                {"attn": 2},
                {"attn": 3},
                {"attn": "x"},
                {"attn": None},
                {"": 2},
                {"attn": float("nan")},
            ]
        )
    elif kind == "regex":
        config[rng.choice(["rank_pattern", "alpha_pattern"])] = {
            rng.choice(
                [
                    "(",
                    "[",
                    "*",
                    "(?P<x",
                    "\\",
                    "(a+)+$",
                    "(.*)*$x",
                    "(?:(?:(?:.*)*)*)*y",
                    "a{99999999999}",
                    "((((((((((.*)*)*)*)*)*)*)*)*)*)z",
                ]
            ): 2
        }
    elif kind == "flags":
        config[rng.choice(["use_rslora", "fan_in_fan_out", "bias", "modules_to_save", "inference_mode"])] = rng.choice(
            [True, False, None, "x", [], ["head"], 3]
        )
    elif kind == "odd":
        config[rng.choice(list(config))] = rng.choice([x for x in ODD if x != "\ud800"])
    elif kind == "refused":
        config[
            rng.choice(["use_dora", "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices"])
        ] = rng.choice([True, [1], {"a": 1}, "x"])
    elif kind == "factors":
        tensors.pop(rng.choice(list(tensors)))
    elif kind == "shapes":
        side = rng.choice(list(tensors))
        tensors[side] = rng.choice(
            [
                torch.randn(2),
                torch.tensor(1.0),
                torch.randn(0, 6),
                torch.randn(8, 0),
                torch.randn(2, 6, 1, 1),
                torch.randn(3, 3),
                torch.randn(2, 7),
                torch.randn(9, 2),
            ]
        )
        if rng.random() < 0.4:
            config["r"] = rng.choice([0, 1, 3])
            tensors = {
                k: torch.zeros(config["r"], 6) if "lora_A" in k else torch.zeros(8, config["r"]) for k in tensors
            }
    elif kind == "names":
        old = rng.choice(list(tensors))
        tensors[
            rng.choice(
                [
                    "lora_A.weight",
                    ".lora_B.weight",
                    "base_model.model..lora_A.weight",
                    "x.lora_C.weight",
                    "x.lora_magnitude_vector.weight",
                    "x.lora_embedding_A",
                    old + ".x",
                    "\n.lora_A.weight",
                ]
            )
        ] = tensors.pop(old)
    elif kind == "both":
        case.write("adapter/adapter_model.bin", b"garbage")
    elif kind == "huge":
        side = rng.choice([30000, 60000])
        tensors["base_model.model.blocks.0.attn.lora_A.weight"] = torch.randn(1, side)
        tensors["base_model.model.blocks.0.attn.lora_B.weight"] = torch.randn(side, 1)
        config["r"] = 1
    elif kind == "nan":
        tensors[rng.choice(list(tensors))].view(-1)[0] = rng.choice([float("nan"), float("inf"), 3e38])
    elif kind == "rslora":
        config |= {"use_rslora": True, "r": rng.choice([0, -1, 2])}
        if config["r"] == 0:
            tensors = {k: torch.zeros(0, 6) if "lora_A" in k else torch.zeros(8, 0) for k in tensors}
    elif kind == "init":
        config["init_lora_weights"] = rng.choice(
            [True, "gaussian", "pissa", "PiSSA_niter_4", "olora", 3, None, [], "eva"]
        )
    elif kind == "deep":
        text = json.dumps(config)[:-1] + ', "x": ' + "[" * rng.choice([500, 50000]) + "]" * 500 + "}"
    if kind == "bin":
        buffer = io.BytesIO()
        torch.save(rng.choice([tensors, {"a": Gadget("system")}, [tensors], {}]), buffer)
        case.write("adapter/adapter_model.bin", buffer.getvalue())
    else:
        case.write("adapter/adapter_model.safetensors", save({k: v.contiguous() for k, v in tensors.items()}))
    if kind != "noconfig":
        case.write("adapter/adapter_config.json", json.dumps(config) if text is None else text)
    case.models[1] = rng.choice(
        [
            case.path("adapter"),
            case.path("adapter/adapter_model.bin" if kind == "bin" else "adapter/adapter_model.safetensors"),
        ]
    )
    options(case)


def fuzz_hf(case):
    rng = case.rng
    plain(case, victim="hf")
    case.checked = False
    case.path("m1.safetensors").unlink()
    folder = case.path("hf")
    folder.mkdir()
    kind = case.name = rng.choice(
        [
            "sound",
            "empty",
            "dir",
            "truncated",
            "two",
            "bin",
            "config",
            "openclip",
            "both",
            "pathmodel",
            "manifest",
            "symlink",
            "nested",
            "indexempty",
        ]
    )
    if kind in ("sound", "config", "both"):
        case.write("hf/model.safetensors", SOUND["model_bytes"][1])
    if kind == "dir":
        (folder / "model.safetensors").mkdir()
    elif kind == "truncated":
        case.write("hf/model.safetensors", SOUND["model_bytes"][1][:-5])
    elif kind == "two":
        case.write("hf/a.safetensors", SOUND["model_bytes"][1]), case.write("hf/b.safetensors", SOUND["model_bytes"][0])
    elif kind == "bin":
        case.write("hf/pytorch_model.bin", rng.choice([b"", b"x", b"PK\x03\x04" + b"\0" * 30]))
    elif kind == "config":
        case.write("hf/config.json", rng.choice(["", "{", '{"auto_map": {"AutoModel": "evil.Model"}}']))
        case.write("hf/evil.py", f"import os; os.system('touch {os.environ['FUZZ_CANARY']}')")
    elif kind == "openclip":
        case.write("hf/open_clip_model.safetensors", SOUND["model_bytes"][1])
    elif kind == "both":
        case.write("hf/model.safetensors.index.json", rng.choice(["{}", "", '{"weight_map": {}}']))
    elif kind == "manifest":
        case.write("hf/manifest.json", rng.choice(["{}", "", "x"]))
        case.write("hf/model.safetensors", SOUND["model_bytes"][1])
    elif kind == "symlink":
        (folder / "model.safetensors").symlink_to(
            rng.choice(["/dev/zero", "nothing", "model.safetensors", "../m0.safetensors", "../hf"])
        )
    elif kind == "nested":
        case.write("hf/hf/model.safetensors", SOUND["model_bytes"][1])
    elif kind == "indexempty":
        case.write("hf/model.safetensors.index.json", '{"weight_map": {}}')
    case.models[1] = folder
    options(case)


def fuzz_bank(case):
    rng = case.rng
    plain(case, victim="run")
    case.checked = False
    base = {k: v for k, v in SOUND["base"].items() if v.is_floating_point() and "running" not in k}

    own_base = fingerprint(base)

    def vector(task, *, base_print=own_base, sha=None, tensors=None):
        tau = tensors if tensors is not None else {k: torch.randn(v.shape) for k, v in base.items()}
        header = {"task": str(task), "name": f"t{task}", "base": base_print, "sha256": sha or fingerprint(tau)}
        return save(tau, metadata=header), tau

    run = case.path("run")
    (run / "bank").mkdir(parents=True)
    for task in range(3):
        case.write(f"run/bank/task_{task:03d}.safetensors", vector(task)[0])
    case.write("run/manifest.json", json.dumps({"schema": 1, "trained": 3}))
    kind = case.name = rng.choice(
        [
            "sound",
            "manifest",
            "swapped",
            "missing",
            "truncated",
            "otherbase",
            "flipped",
            "sha",
            "names",
            "extra",
            "dup",
            "shapes",
            "nobank",
            "odd",
            "dirfile",
            "symlink",
            "bankonly",
            "empty",
            "nan",
            "number",
        ]
    )
    if kind == "manifest":
        case.write("run/manifest.json", rng.choice(["", "{", "[]", '{"schema": 99}', '{"state": "../../etc"}']))
    elif kind == "swapped":
        a, b = run / "bank/task_000.safetensors", run / "bank/task_001.safetensors"
        one, two = a.read_bytes(), b.read_bytes()
        a.write_bytes(two), b.write_bytes(one)
    elif kind == "missing":
        (run / "bank/task_001.safetensors").unlink()
    elif kind == "truncated":
        file = run / "bank/task_001.safetensors"
        file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])
    elif kind == "otherbase":
        case.write("run/bank/task_001.safetensors", vector(1, base_print=rng.choice(["0" * 64, "x", "é"]))[0])
    elif kind == "flipped":
        data = bytearray((run / "bank/task_001.safetensors").read_bytes())
        data[-1 - rng.randrange(100)] ^= 1 << rng.randrange(8)
        case.write("run/bank/task_001.safetensors", bytes(data))
    elif kind == "sha":
        case.write("run/bank/task_001.safetensors", vector(1, sha="0" * 64)[0])
    elif kind == "names":
        case.write("run/bank/task_001.safetensors", vector(1, tensors={"other": torch.ones(2)})[0])
    elif kind == "extra":
        (
            case.write("run/bank/task_099.safetensors", rng.choice([b"", vector(99)[0]])),
            case.write("run/bank/notes.txt", "x"),
            case.write("run/bank/.task_003.safetensors.abc.tmp", "x"),
        )
    elif kind == "dup":
        case.write("run/bank/task_0001.safetensors", vector(1)[0])
    elif kind == "shapes":
        case.write("run/bank/task_001.safetensors", vector(1, tensors={k: torch.ones(3) for k in base})[0])
    elif kind == "nobank":
        shutil.rmtree(run / "bank")
    elif kind == "odd":
        case.write(
            "run/bank/task_001.safetensors",
            save(
                {k: torch.ones(v.shape) for k, v in base.items()},
                metadata={
                    "task": "x",
                    "name": "\x1b[2J",
                    "base": "",
                    "steps": "NaN",
                    "low_rank": rng.choice(["{", "{}", '{"head.weight": 1}']),
                },
            ),
        )
    elif kind == "dirfile":
        (run / "bank/task_001.safetensors").unlink(), (run / "bank/task_001.safetensors").mkdir()
    elif kind == "symlink":
        (
            (run / "bank/task_001.safetensors").unlink(),
            (run / "bank/task_001.safetensors").symlink_to(
                rng.choice(["/dev/zero", "nothing", "task_000.safetensors", "../../m0.safetensors"])
            ),
        )
    elif kind == "empty":
        shutil.rmtree(run / "bank"), (run / "bank").mkdir()
    elif kind == "nan":
        case.write(
            "run/bank/task_001.safetensors",
            vector(1, tensors={k: torch.full(v.shape, float("nan")) for k, v in base.items()})[0],
        )
    elif kind == "number":
        (run / "bank/task_001.safetensors").rename(run / f"bank/task_{'9' * rng.choice([20, 200])}.safetensors")
    case.models = [run / "bank" if kind == "bankonly" or rng.random() < 0.2 else run]
    options(case, merger=("--merger", rng.choice(["TaskArithmetic", "OPCM", "MagMax", "TIES"])))
    case.names = ["case/run", "m0.safetensors"]


def fuzz_verify(case):
    """A merged file whose ledger is changed."""
    rng = case.rng
    plain(case)
    key = case.rng.choice(["TaskArithmetic", "TIES"])
    _, err, rc, _ = captured(
        command,
        [
            "merge",
            "--base",
            case.base,
            "--models",
            *case.models,
            "--merger",
            key,
            "--out",
            case.path("out.safetensors"),
        ],
    )
    assert rc == 0, err
    data = case.path("out.safetensors").read_bytes()
    header, body = header_and_data(data)
    ledger = json.loads(header["__metadata__"]["clmerge"])
    case.names = ["out.safetensors", "m1.safetensors", "base.safetensors"]
    kind = case.name = rng.choice(
        [
            "sound",
            "flipped",
            "field",
            "threads",
            "class_path",
            "files",
            "schema",
            "garbage",
            "deep",
            "models",
            "base",
            "nometa",
            "truncated",
            "shards",
            "groups",
        ]
    )
    if kind == "flipped":
        body = bytearray(body)
        body[rng.randrange(len(body))] ^= 1
        body = bytes(body)
    elif kind == "field":
        ledger[rng.choice([*ledger, "x"])] = rng.choice([x for x in ODD if x != "\ud800"])
        case.names = []
    elif kind == "threads":
        ledger["threads"] = rng.choice([0, -1, 2**31, 2**63, 100000, 10**30, "x", 1.5, None])
    elif kind == "class_path":
        ledger["merger"] = {
            "class_path": rng.choice(["os.system", "Merger", "", "TIES", 3, None]),
            "init_args": rng.choice(
                [
                    {},
                    {"command": f"touch {os.environ['FUZZ_CANARY']}"},
                    None,
                    [],
                    {"scale": "x"},
                    {"density": {"class_path": "os.system", "init_args": {}}},
                ]
            ),
        }
        case.names = []
    elif kind == "files":
        ledger["files"] = rng.choice(
            [
                None,
                [],
                [{}],
                [{"path": "/dev/zero", "bytes": 1, "sha256": "0"}],
                [{"path": "/etc/passwd", "bytes": 1, "sha256": "0"}],
                3,
                [{"path": 3, "bytes": 1, "sha256": "0"}],
                [{"path": "a\0b", "bytes": 0, "sha256": None}],
            ]
        )
        case.names = []
    elif kind == "schema":
        ledger["schema"] = rng.choice([0, 2, None, "1", 1.0, True])
    elif kind in ("models", "base"):
        ledger[kind] = rng.choice([None, "", [], 3, "nothing", ["nothing"], [3], ["/dev/zero"], "/dev/zero", [None]])
        case.names = []
    elif kind == "shards":
        ledger["shards"] = rng.choice(
            [None, [], {"../m0.safetensors": "0"}, {"/etc/passwd": "0"}, {"a\0": "0"}, {"": "0"}, {"x": 3}]
        )
    elif kind == "groups":
        ledger["groups"] = rng.choice(
            [
                None,
                3,
                [3],
                [{}],
                [{"match": 3, "merger": None}],
                [{"match": ["*"], "merger": 3}],
                [{"match": ["*"], "merger": {"class_path": "MagMax", "init_args": {}}}],
            ]
        )
        case.names = []
    header["__metadata__"]["clmerge"] = json.dumps(ledger)
    if kind == "garbage":
        header["__metadata__"]["clmerge"] = rng.choice(["", "{", "[]", "null", "3", "[" * 100000, '{"schema": 1}'])
    elif kind == "deep":
        ledger["merger"] = {"class_path": "MagMax", "init_args": {"scale": 1}}
        header["__metadata__"]["clmerge"] = json.dumps(ledger).replace(
            '"scale": 1', '"scale": ' + "[" * 900 + "]" * 900
        )
        case.names = []
    elif kind == "nometa":
        header.pop("__metadata__")
    data = assembled(header, body)
    if kind == "truncated":
        data = data[: rng.randrange(len(data))]
    case.write("out.safetensors", data)
    case.argv = ["--verify", case.path("out.safetensors")]


def fuzz_options(case):
    """Sound files, odd options."""
    rng = case.rng
    plain(case)
    case.checked, case.names = False, []
    odd = rng.choice(
        [
            ["--threads", rng.choice(["0", "-1", "x", "1e3", "99999999999999999999", "2", "1.5", ""])],
            ["--dtype", rng.choice(["float16", "x", "", "int8", "float64", "bfloat16", "float8_e5m2"])],
            ["--include", rng.choice(["*", "", "[", "nothing*", "*.weight", "*" * 5000, "a\nb", "\ud800"])],
            ["--exclude", rng.choice(["*", "", "[", "nothing*", "*.weight", "head.*"])],
            ["--origin", rng.choice(["zero", "x", ""])],
            ["--shard-size", rng.choice(["1GB", "0", "9" * 400, "-5", "x", "1e3GB", ""])],
            [
                "--recipe",
                rng.choice(
                    ["nothing.yaml", "", "{", "[]", "null", "3", '{"base": 3}', "/dev/null", "/", str(case.base)]
                ),
            ],
            ["--merger.scale=" + rng.choice(["nan", "inf", "-inf", "x", "", "1e400", "[1]", "null", "9" * 5000])],
            ["--merger.density=2"],
            ["--nope"],
            ["--strict"],
            ["--dry-run"],
            ["--no-hash"],
            ["--overwrite"],
            ["--verify", str(case.base)],
            [
                "--groups",
                rng.choice(
                    ["[]", "x", "[{}]", '[{"match": ["*attn*"], "merger": null}]', '[{"match": 3}]', "[" * 3000]
                ),
            ],
            ["--models"],
            ["--base", ""],
            ["--out", ""],
            [
                "--merger",
                rng.choice(
                    [
                        "",
                        "TEIS",
                        "os.system",
                        "MagMax",
                        "{",
                        "null",
                        "Pipeline",
                        "GreedySoup",
                        "PAINT",
                        "Fisher",
                        "RegMean",
                    ]
                ),
            ],
        ]
    )
    case.name = str(odd[0]).split("=")[0]
    case.argv += odd
    if "--shard-size" in odd:
        case.argv[case.argv.index("--out") + 1] = case.path("outdir")


CATEGORIES = {
    "safetensors": (fuzz_safetensors, 30),
    "torch": (fuzz_torch, 20),
    "index": (fuzz_index, 8),
    "paths": (fuzz_paths, 8),
    "recipe": (fuzz_recipe, 14),
    "mergekit": (fuzz_mergekit, 12),
    "peft": (fuzz_peft, 12),
    "hf": (fuzz_hf, 4),
    "bank": (fuzz_bank, 8),
    "verify": (fuzz_verify, 8),
    "options": (fuzz_options, 6),
}
