"""The `jaxmodels` command (architecture.md section 4): the one place that may import any room, lazily.

Exit codes: 0 done, 2 bad input, 74 cannot save, 75 interrupted and saved, 130 interrupted, 1 anything else. An error
is one line on stderr; ``--debug`` shows the traceback. Results go to stdout, plain and untruncated when piped;
progress to stderr. Nothing heavy is imported before a command needs it, so ``list`` and ``--help`` answer at once.
"""

import argparse
import contextlib
import functools
import importlib
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jaxmodels._platform import prepare_jax
from jaxmodels.errors import Interrupted, UserError

ROOT = Path(__file__).resolve().parents[1]  # the checkout; benchmarks/ lies beside the packages there


class Parser(argparse.ArgumentParser):
    """argparse that reports bad usage as every other bad input is reported."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        with _traceback_if("--debug" in argv):
            code = _dispatch([word for word in argv if word != "--debug"])
            sys.stdout.flush()
            return code
    except BrokenPipeError:  # `jaxmodels list | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:  # outside a run, which saves and raises Interrupted
        print("jaxmodels: interrupted", file=sys.stderr)
        return 130
    except (UserError, Interrupted) as error:
        print(f"jaxmodels: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"jaxmodels: {told} (a bug, or not enough of something; --debug shows where)", file=sys.stderr)
        return 1


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if str(Path.cwd()) not in sys.path:  # experiments named by module path, such as tests.tiny_experiment
        sys.path.append(str(Path.cwd()))
    if argv[0] == "--version":
        from importlib.metadata import version

        print(version("jaxmodels"))
        return 0
    if argv[0] not in COMMANDS:
        from train.runtime.config import did_you_mean

        raise UserError(f"unknown command {argv[0]!r}; {did_you_mean(argv[0], COMMANDS)}")
    parser = parser_of(argv[0])
    if any(word in ("-h", "--help") for word in argv[1:]):
        names = [word for word in argv[1:] if not word.startswith("-") and "=" not in word]
        parser.print_help()
        if argv[0] == "run" and names:
            _print_keys(names[0], [word for word in argv[2:] if "=" in word and not word.startswith("-")])
        return 0
    # run's overrides may stand before and after --out; plain parse_args would refuse the second group
    return COMMANDS[argv[0]][1](parser.parse_intermixed_args(argv[1:])) or 0


def parser_of(name: str) -> Parser:
    """The parser of one command's arguments."""
    add_arguments, command = COMMANDS[name]
    line, _, rest = (command.__doc__ or "").partition("\n")
    parser = Parser(
        prog=f"jaxmodels {name}",
        description=line,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    add_arguments(parser)
    parser.add_argument("-h", "--help", action="store_true", help="this page")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


# Experiments


def _list_arguments(parser: Parser) -> None:
    pass


def command_list(arguments: argparse.Namespace) -> int:
    """Every experiment: name, what it does, the data it needs and whether it is here, minutes on two cores."""
    from train.runtime.config import experiment_names, find
    from train.runtime.table import print_table

    rows = [("experiment", "what it does", "needs", "minutes on two cores")]
    for experiment in map(find, experiment_names()):
        needs = ", ".join(f"{need} ({_whether_here(need)})" for need in experiment.needs) or "nothing"
        minutes = ", ".join(f"{preset} {value:g}" for preset, value in experiment.minutes.items()) or "not measured"
        rows.append((experiment.name, experiment.line, needs, minutes))
    print_table(rows)
    return 0


def _run_arguments(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help="an experiment of `jaxmodels list`")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="preset=tiny, or any key of the experiment")
    parser.add_argument("--out", metavar="DIR", help="run folder (default: runs/NAME-<hash of the config>)")


def command_run(arguments: argparse.Namespace) -> int:
    """Run or resume an experiment; the last line of the output is the path of its report.

    The same command finds its own folder again and goes on where it stopped; `jaxmodels run NAME --help` lists keys.
    """
    from train.runtime.config import defaults_of, find, resolve, to_dict

    config = resolve(arguments.name, arguments.overrides)
    prepare_jax()
    from train.runtime.config import load_function

    about = {"operational": getattr(config, "operational", ()), "defaults": defaults_of(config)}
    with _open_run(find(arguments.name).name, to_dict(config), arguments.out, **about) as run:
        load_function(config.entry)(config, run)
    if run.writes:
        print(_build_report(run.dir, config.report))
    return 0


@contextlib.contextmanager
def _open_run(name: str, config: dict, out: str | None, **about):
    """The run folder, locked, with signals heard; among several processes all but the first leave writing to it."""
    from train.runtime import distributed
    from train.runtime.progress import clock
    from train.runtime.run_folder import RunFolder
    from train.runtime.signals import stop

    start = time.monotonic()
    several = distributed.initialize()
    follower = several and distributed.process_index() != 0
    folder = RunFolder.open(name, config, out, follower=follower, **about)
    tell = functools.partial(print, file=sys.stderr) if not follower else lambda *_: None
    with stop.listening(several, ends=True), folder as run:
        tell(f"{name}: {'resuming' if run.resumed else 'running'} in {run.dir}")
        yield run
        tell(f"{name}: done in {clock(time.monotonic() - start)}")


def _sweep_arguments(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help="an experiment of `jaxmodels list`")
    parser.add_argument("overrides", metavar="grid=... seeds=N together=N workers=N key=value", nargs="+",
                        help="a grid that the experiment names, or key=value,value;key=value,value; seeds (default 1); "
                        "how many seeds are trained together, in one step (default 1); how many processes run trials "
                        "at once (default 1: this one); keys for all trials")
    parser.add_argument("--out", metavar="DIR", help="sweep folder (default: runs/NAME-sweep-<hash>)")


def command_sweep(arguments: argparse.Namespace) -> int:
    """Run an experiment with every variant of a grid and several seeds; writes one report that compares them.

    Trials lie in the sweep's folder, each a run of its own. The same command goes on where it stopped; raising seeds
    adds to what is there. What the processes of workers=N print is in its logs/.
    """
    from train import sweep

    planned = sweep.plan(arguments.name, arguments.overrides)
    prepare_jax()
    with _open_run(planned.name, planned.config, arguments.out, operational=planned.operational) as run:
        failure = sweep.run(planned, run, _build_report)
    if run.writes:
        print(_build_report(run.dir, planned.config["report"]))
    if failure:  # after the report of those that went well
        raise failure
    return 0


def _report_arguments(parser: Parser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run folder; several are compared in one report")
    parser.add_argument("--out", metavar="FILE", help="page of a comparison (default: comparison.html beside the runs)")
    parser.add_argument("--experiment", metavar="A.B", help="module of the experiment, if it is one of your own")


def command_report(arguments: argparse.Namespace) -> int:
    """Build the report of a run again from what its folder holds, or one that compares several; prints its path."""
    from train.runtime.files import read_json

    folders = [Path(run) for run in arguments.runs]
    abouts = [read_json(folder / "config.json") if folder.is_dir() else None for folder in folders]
    for folder, about in zip(folders, abouts, strict=True):
        if about is None:
            raise UserError(f"{folder} is not a run folder: it has no config.json; see the folders in runs/")
    prepare_jax()
    if len(folders) > 1:
        from analysis.report.compare import build

        print(build(folders, arguments.out or folders[0].absolute().parent / "comparison.html"))
        return 0
    if arguments.out:
        raise UserError("--out is for comparing several runs; the report of one is written into its folder")
    print(_build_report(folders[0], _report_of(folders[0], str(abouts[0].get("name")), arguments.experiment)))
    return 0


def _report_of(folder: Path, run: str, module: str | None) -> str:
    """What builds its report, ``module:function``: a folder from elsewhere must not choose what is called."""
    from train.runtime.config import experiment_names, experiment_of, find
    from train.sweep import REPORT

    name = experiment_of(run)
    if module is None and name not in experiment_names():
        raise UserError(f"{folder} is a run of {name!r}, which is none of the experiments here; if it is one of your "
                        "own, give its module with --experiment a.b")
    experiment = find(module or name)
    if experiment.name != name:
        raise UserError(f"{folder} is a run of {name!r}, not of {experiment.name!r}; give the module of {name!r}")
    config = experiment.get_config()
    return getattr(config, "sweep_report", REPORT) if run == f"{name}-sweep" else config.report


def _build_report(directory: Path, function: str) -> Path:
    from train.runtime.config import load_function
    from train.runtime.progress import clock

    start = time.monotonic()
    load_function(function)(directory)
    print(f"report: {clock(time.monotonic() - start)}", file=sys.stderr)
    return directory / "report.html"


# Models


def _model_arguments(parser: Parser, what: str) -> None:
    parser.add_argument("model", metavar="MODEL", help=what)
    parser.add_argument("--allow-download", action="store_true", help="fetch MODEL (org/name) from its public home")
    parser.add_argument("--dtype", default="float32", help="float32 (default), bfloat16 or float16")


def _split_arguments(parser: Parser) -> None:
    _model_arguments(parser, "folder, .gguf or .safetensors file, or name")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to write")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--expert-size", type=int, metavar="S", help="neurons of an expert (default 32)")
    sizes.add_argument("--num-experts", type=int, metavar="E", help="experts of a layer")
    parser.add_argument("--pad", action="store_true", help="append zero neurons where sizes do not divide")
    parser.add_argument("--method", default="kmeans",
                        help="kmeans (default), coactivation, markers, importance or random")
    parser.add_argument("--vector", default="gate", help="what stands for a neuron: gate (default), up or concat")
    parser.add_argument("--text", metavar="SOURCE[:LANG,LANG]", help="text for coactivation, markers (default gettext) "
                        "and importance (a cluster of experts for each language)")
    parser.add_argument("--shared", type=int, default=0, metavar="N", help="always-on experts (markers, importance)")
    parser.add_argument("--router", default="all", help="all (default: exact), similarity, markers, oracle, "
                        "random, or linear and mlp (which start as similarity does and are yet to be trained)")
    parser.add_argument("--top-k", type=int, metavar="K", help="experts of a token, for every router but all")
    parser.add_argument("--block", type=int, default=1, metavar="T", help="neighbouring tokens routed together")
    parser.add_argument("--seed", type=int, default=0)


def command_split(arguments: argparse.Namespace) -> int:
    """Split every feed-forward layer of a model into experts and save it; with all experts on it computes the same.

    Texts are named as in an atlas (gettext, udhr, path:DIR ...), with languages after a colon: gettext:de,fr.
    """
    prepare_jax()
    from jaxmodels.decoder.config import ROUTERS
    from jaxmodels.experts.split import METHODS, VECTORS

    routers = [router for router in ROUTERS if router != "softmax"]  # that one is trained
    for option, choices in (("method", METHODS), ("vector", VECTORS), ("router", routers)):
        _check_choice(option, getattr(arguments, option), choices)
    reads_text = arguments.method in ("coactivation", "markers", "importance")
    if arguments.text and not reads_text:
        raise UserError(f"--method {arguments.method} reads no text; leave --text out")
    if arguments.method == "importance" and not arguments.text:
        raise UserError("--method importance needs the languages to cluster by: --text gettext:en,fr,ru")
    if arguments.top_k is not None and arguments.router == "all":
        raise UserError("--top-k needs a --router that chooses: similarity, linear, mlp, markers, oracle or random")
    out = _new_folder(arguments.out)
    import jaxmodels
    from train.runtime.progress import progress

    size = 32 if arguments.num_experts is None and arguments.expert_size is None else arguments.expert_size
    model, tokenizer = _load(arguments, needs_tokenizer=reads_text)
    statistics = _split_statistics(arguments, model, tokenizer) if reads_text else {}
    with progress(model.cfg.num_layers, "splitting layers") as advance:
        expert_model, _ = jaxmodels.split(
            model, expert_size=size, num_experts=arguments.num_experts, pad=arguments.pad, method=arguments.method,
            vector=arguments.vector, num_shared=arguments.shared, router=arguments.router, top_k=arguments.top_k,
            block=arguments.block, seed=arguments.seed, progress=lambda done, total: advance(), **statistics
        )  # fmt: skip
    print(_save(expert_model, out, tokenizer, arguments.model))
    return 0


def _split_statistics(arguments: argparse.Namespace, model, tokenizer) -> dict[str, list]:
    """What coactivation, markers (inputs of each layer) and importance (gradients) need, measured on text."""
    from analysis.statistics import ffn_inputs, neuron_importance, read_rows, split_name

    text = arguments.text or "gettext"
    if arguments.method != "importance":
        return {"activations": ffn_inputs(model, list(read_rows(text, tokenizer, 2000).values()))}
    languages = split_name(text)[1]
    if not languages:
        raise UserError(f"--text {text} names no languages; importance clusters by them: --text {text}:en,fr,ru")
    return {"importance": neuron_importance(model, list(read_rows(text, tokenizer, 1000 * len(languages)).values()))}


def _prune_arguments(parser: Parser) -> None:
    _model_arguments(parser, "a model, dense or split (jaxmodels split)")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to write")
    parser.add_argument("--keep", metavar="FILE", help=".npy or .npz: bool[layers, experts] of a split model, "
                        "bool[layers, neurons] of a dense one")
    parser.add_argument("--language", metavar="CODE", help="keep what this language uses most (and repair with it)")
    parser.add_argument("--share", type=float, metavar="P", help="share of the feed-forward layers to keep (0.5)")
    parser.add_argument("--text", metavar="SOURCE", default="gettext", help="text of the language (default gettext)")
    parser.add_argument("--repair", action="store_true", help="refit what is left to the whole model's activations")


def command_prune(arguments: argparse.Namespace) -> int:
    """Keep a part of every feed-forward layer: saves a smaller dense model.

    Either --keep FILE says what stays, or --language and --share choose: the experts (neurons, of a model that is not
    split) with the highest mean contribution on text of the language. With --repair, which needs --language, the rest
    is refitted to stand in for what is gone; of a dense model it then also chooses the neurons (those that the others
    can replace least), and the first layer of a deep one stays whole.
    """
    if arguments.keep is not None and arguments.share is not None:
        raise UserError("--keep says what stays; leave --share out")
    if arguments.keep is None and arguments.language is None:
        raise UserError("nothing says what to keep; give --keep FILE, or --language CODE --share 0.5")
    if arguments.keep is not None and bool(arguments.language) != arguments.repair:
        raise UserError("with --keep, --language and --repair go together: the language's text is what repairs")
    share = 0.5 if arguments.share is None else arguments.share
    if not 0 < share <= 1:
        raise UserError(f"--share {share:g}: it must be above 0 and at most 1")
    from analysis.keep_file import read_keep

    keep = None if arguments.keep is None else read_keep(arguments.keep)
    out = _new_folder(arguments.out)
    prepare_jax()
    from analysis.prune_language import cut
    from train.runtime.progress import progress

    model, tokenizer = _load(arguments, needs_tokenizer=arguments.language is not None)
    rows = None
    if arguments.language is not None:
        from analysis.statistics import read_rows

        rows = read_rows(f"{arguments.text}:{arguments.language}", tokenizer, 16_384, least=256)
        if len(rows) > 1:
            raise UserError(f"--language {arguments.language} names {len(rows)} languages; name one")
        (rows,) = rows.values()
    passes = 2 if keep is None and model.cfg.experts is None else 1  # neurons are ranked first
    steps = passes * model.cfg.num_layers
    bar = progress(steps, "repairing layers") if arguments.repair else contextlib.nullcontext()
    with bar as advance:
        small = cut(model, keep=keep, share=share, rows=rows, repair=arguments.repair, advance=advance)
    print(_save(small, out, tokenizer, arguments.model))
    return 0


def _load(arguments: argparse.Namespace, needs_tokenizer: bool):
    """(model, tokenizer or None). The tokenizer first: a damaged one is reported before any work."""
    import jaxmodels
    from jaxmodels.hub.resolve import resolve
    from jaxmodels.hub.tokenizer import has_tokenizer, load_tokenizer

    path = resolve(arguments.model, arguments.allow_download)
    tokenizer = load_tokenizer(path) if needs_tokenizer or has_tokenizer(path) else None
    model = jaxmodels.load(path, arguments.dtype)
    if not isinstance(model, jaxmodels.Decoder):
        raise UserError(f"{arguments.model} is an encoder; only decoders are split and pruned: give one of those")
    return model, tokenizer


def _save(model, out: Path, tokenizer, source: str) -> Path:
    import jaxmodels

    if tokenizer is None:
        print(f"jaxmodels: {source} has no tokenizer, so {out} is written without one", file=sys.stderr)
    jaxmodels.save(model, out, extra_files=tokenizer and tokenizer.files())
    return out


def _check_choice(option: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        from train.runtime.config import did_you_mean

        raise UserError(f"--{option} {value!r} is unknown; {did_you_mean(value, choices)}")


def _generate_arguments(parser: Parser) -> None:
    _model_arguments(parser, "folder, .gguf file or name")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="may be repeated; default: lines of stdin")
    parser.add_argument("--chat", action=argparse.BooleanOptionalAction, help="put each prompt into the model's chat "
                        "template (default: where it has one)")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) is greedy")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="sample among the K likeliest; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample within probability mass P")
    parser.add_argument("--seed", type=int, default=0)


def command_generate(arguments: argparse.Namespace) -> int:
    """Continue prompts with a model, dense, split or pruned."""
    prompts = arguments.prompt
    if prompts is None:
        if sys.stdin.isatty():
            raise UserError("no prompt; give --prompt TEXT or pipe lines into the command")
        from train.data.text import decode

        text, replaced = decode(sys.stdin.buffer.read())
        if replaced:
            print(f"jaxmodels: {replaced} invalid UTF-8 sequences on stdin were replaced", file=sys.stderr)
        prompts = [line for line in text.splitlines() if line.strip()]
    if not prompts or not all(prompts):
        raise UserError("an empty prompt; give at least one character")
    limits = {
        "--max-new-tokens": (arguments.max_new_tokens, arguments.max_new_tokens >= 1, "at least 1"),
        "--temperature": (arguments.temperature, arguments.temperature >= 0, "at least 0"),
        "--top-k": (arguments.top_k, arguments.top_k >= 0, "at least 0"),
        "--top-p": (arguments.top_p, 0 < arguments.top_p <= 1, "above 0 and at most 1"),
    }
    for option, (value, good, limit) in limits.items():
        if not good:
            raise UserError(f"{option} {value}: it must be {limit}")
    prepare_jax()
    from jaxmodels.decoder.generate import generate_text

    texts = generate_text(arguments.model, prompts, max_new_tokens=arguments.max_new_tokens,
                          temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p,
                          seed=arguments.seed, chat=arguments.chat, dtype=arguments.dtype,
                          allow_download=arguments.allow_download)
    for text in texts:
        print(text, flush=True)
    return 0


def _embed_arguments(parser: Parser) -> None:
    parser.add_argument("fasta", metavar="FASTA", help="proteins, plain or gzip")
    parser.add_argument("--model", metavar="MODEL", required=True, help="an ESM encoder: folder, file or name")
    parser.add_argument("--out", metavar="FILE", required=True, help=".npz file to write")
    parser.add_argument("--pool", default="mean", help="mean over residues (default), cls, or none: every residue")
    parser.add_argument("--batch-tokens", type=int, default=8192, metavar="N", help="of a batch (default 8192)")
    parser.add_argument("--max-length", type=int, metavar="N", help="residues; longer proteins are done in overlapping "
                        "windows of this length (default 1022, as ESM-2 was trained)")
    parser.add_argument("--allow-download", action="store_true", help="fetch MODEL (org/name) from its public home")
    parser.add_argument("--dtype", default="float32", help="float32 (default), bfloat16 or float16")


def command_embed(arguments: argparse.Namespace) -> int:
    """Write the embeddings of the proteins of a FASTA file, in its order, as an .npz file.

    It holds names, lengths and embeddings: float32[proteins, width], or with --pool none float32[residues, width] and
    the offsets at which proteins begin. What had to be changed or left out of the input is counted on stderr.
    """
    prepare_jax()
    from jaxmodels.esm.embed import POOLS, embed
    from jaxmodels.esm.fasta import read_fasta

    _check_choice("pool", arguments.pool, POOLS)
    records = read_fasta(arguments.fasta)  # a damaged file is reported before a model is loaded
    import jaxmodels
    from train.runtime.progress import progress

    model = jaxmodels.load(arguments.model, arguments.dtype, allow_download=arguments.allow_download)
    report = embed(model, records, arguments.out, pool=arguments.pool, batch_tokens=arguments.batch_tokens,
                   max_length=arguments.max_length, about=arguments.model,
                   progress=lambda total: progress(total, "embedding residues"))
    for line in report.lines():
        print(f"jaxmodels: {line}", file=sys.stderr)
    print(arguments.out)
    return 0


def _predict_arguments(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="the folder of a finished run")
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument("--text", action="append", metavar="TEXT", help="may be repeated")
    texts.add_argument("--csv", metavar="FILE", help="a CSV file with a text in each row")
    parser.add_argument("--column", metavar="NAME", help="its column of texts")
    parser.add_argument("--top", type=int, metavar="K", help="so many answers a text (default: those the run gives)")
    parser.add_argument("--out", metavar="FILE", help="CSV file to write (default: a table on stdout)")


def command_predict(arguments: argparse.Namespace) -> int:
    """What a finished run says about texts: codes, their path in the tree and scores (text2tree); entities (ner)."""
    prepare_jax()
    from train.predict import command
    from train.runtime.table import print_table

    command(arguments, print_table)
    return 0


def _annotate_arguments(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="the folder of a finished run of ner")
    parser.add_argument("--pool", metavar="FILE", required=True, help="unlabelled text, or JSON lines with text")
    parser.add_argument("--budget", type=int, metavar="N", help="words to choose at most")
    parser.add_argument("--out", metavar="FILE", help="the batch to write")
    parser.add_argument("--format", default="jsonl", help="of the batch: jsonl (default), doccano or label_studio")
    parser.add_argument("--strategy", default="mnlp", help="mnlp (default), lc, bald, entropy, submod, random ...")
    parser.add_argument("--passes", type=int, default=10, metavar="M", help="with dropout, for bald (default 10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--labelled", action="append", metavar="FILE", help="an export of an earlier batch, which is "
                        "not chosen again; may be repeated")
    parser.add_argument("--train", metavar="FILE", help="write the labelled sentences as training data (CoNLL)")


def command_annotate(arguments: argparse.Namespace) -> int:
    """Pick the sentences that people should label next, pre-tagged, for doccano or Label Studio; take exports back."""
    prepare_jax()
    from analysis.active_learning.annotate import command

    command(arguments)
    return 0


# Ahead of time


def _compile_arguments(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help="a training experiment of `jaxmodels list`")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="as for `jaxmodels run`")
    parser.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help="v5e:2x4, v5p:4x4x4, v6e:4x4 ...")


def command_compile(arguments: argparse.Namespace) -> int:
    """Compile the real step of a training experiment for a TPU slice that is not here; fails if it does not fit.

    Memory of a device, collectives and the compiler's estimate of the time (an estimate, not a measurement). Needs the
    tpu extra.
    """
    from train.runtime.aot import compile_in_child
    from train.runtime.config import resolve
    from train.runtime.table import print_table

    resolve(arguments.name, arguments.overrides)  # typing errors are reported without starting a compiler
    found = compile_in_child(arguments.name, arguments.overrides, arguments.topology)
    gib = 2.0**-30
    print_table([
        ("", "of one device"),
        ("state and batch", f"{found.argument_bytes * gib:.3f} GiB"),
        ("temporary", f"{found.temporary_bytes * gib:.3f} GiB"),
        ("in all", f"{found.total_bytes * gib:.3f} GiB of {found.limit_bytes * gib:.1f}"),
        ("estimated step", f"{found.estimated_seconds * 1e3:.2f} ms"),
        ("MFU at that estimate", f"{found.estimated_mfu:.1%}"),
        ("compiled", f"for {found.topology} ({found.devices} devices) in {found.seconds_to_compile:.0f} s"),
    ])
    rows = [(one.kind, str(one.count), f"{one.bytes / 2**20:.2f} MiB") for one in found.collectives]
    print()
    print_table([("collective", "a step", "bytes a step and device"), *(rows or [("none", "0", "0")])])
    for warning in found.warnings:
        print(f"jaxmodels: warning: {warning}", file=sys.stderr)
    if not found.fits:
        raise UserError(f"the step needs {found.total_bytes * gib:.2f} GiB a device, {found.topology} has "
                        f"{found.limit_bytes * gib:.2f}; raise mesh.fsdp, set model.remat or lower data.batch")
    return 0


# Benchmarks


def _bench_arguments(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help="a file of benchmarks/")
    parser.add_argument("--out", metavar="FILE", help="also write the table as JSON, with device and versions")


def command_bench(arguments: argparse.Namespace) -> int:
    """Run a benchmark with its peers side by side in one process; prints a table."""
    from train.runtime.config import did_you_mean

    folder = ROOT / "benchmarks"
    names = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}
    if not names:
        raise UserError(f"no benchmarks in {folder}: they are in a clone of the repository, not in the package")
    if arguments.name not in names:
        raise UserError(f"unknown benchmark {arguments.name!r}; {did_you_mean(arguments.name, names)}")
    prepare_jax()
    sys.path.insert(0, str(ROOT))
    importlib.import_module(f"benchmarks.{arguments.name}").main(arguments.out)
    return 0


COMMANDS: dict[str, tuple[Callable[[Parser], None], Callable[[argparse.Namespace], int]]] = {
    "list": (_list_arguments, command_list),
    "run": (_run_arguments, command_run),
    "sweep": (_sweep_arguments, command_sweep),
    "split": (_split_arguments, command_split),
    "prune": (_prune_arguments, command_prune),
    "generate": (_generate_arguments, command_generate),
    "embed": (_embed_arguments, command_embed),
    "predict": (_predict_arguments, command_predict),
    "annotate": (_annotate_arguments, command_annotate),
    "compile": (_compile_arguments, command_compile),
    "bench": (_bench_arguments, command_bench),
    "report": (_report_arguments, command_report),
}


# Around the commands


def _overview() -> str:
    lines = ["usage: jaxmodels COMMAND ...   (jaxmodels COMMAND --help explains one)", ""]
    lines += [f"  {name:10}{(command.__doc__ or '').partition(chr(10))[0]}" for name, (_, command) in COMMANDS.items()]
    return "\n".join([*lines, "", "An experiment's keys: jaxmodels run NAME --help"])


def _print_keys(name: str, overrides: list[str]) -> None:
    from train.runtime.config import find, keys, resolve
    from train.runtime.table import print_table

    experiment = find(name)
    print(f"\n{experiment.doc}\n\npresets: {', '.join(['default', *experiment.presets])}\n")
    rows = [("key", "type", "value", "")]
    rows += [(key.name, key.type, str(key.default), key.help) for key in keys(resolve(name, overrides))]
    print_table(rows)


def _whether_here(need: str) -> str:
    from jaxmodels.hub.resolve import resolve
    from train.data.sources import is_source, where

    if is_source(need):
        return "here" if where(need) else "missing"
    try:
        resolve(need)  # weights; never downloads
        return "here"
    except UserError:
        return "missing"


def _new_folder(path: str) -> Path:
    """A folder to write a model to: absent or empty, and one can be made there; checked before hours of work."""
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out {folder} exists and is not an empty folder; choose another")
    parent = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"cannot write {folder}: {parent} is not a writable folder; choose another --out")
    return folder


@contextlib.contextmanager
def _traceback_if(debug: bool) -> Iterator[None]:
    """Prints the traceback of what passes through, where the user asked for it."""
    try:
        yield
    except Exception:
        if debug:
            import traceback

            traceback.print_exc()
        raise


def entry() -> None:
    """What the command and ``python -m jaxmodels`` start."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # asks a run to save: while it is imported nothing is to be saved
    code = main()
    if code == Interrupted.exit_code:
        # Everything is saved. Threads that read data may hang in a file system that is gone, and the interpreter would
        # wait for them longer than whoever sent the signal does.
        sys.stdout.flush()
        sys.stderr.flush()
        if not _is_distributed():
            os._exit(code)
    sys.exit(code)


def _is_distributed() -> bool:
    """Whether other processes wait for this one to take its leave."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()
