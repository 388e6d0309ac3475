"""The command ``torchquant``: demo, quantize, report, diagnose. Exit codes: 0 done, 1 failed, 2 wrong usage."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from . import cli_inputs, diagnose
from .config import EFFORTS, Scheme, method_name, parse_method
from .report import Report

T = TypeVar("T")


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    if options.verbose:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        run: Callable[[argparse.Namespace], int] = options.run
        return run(options)
    except KeyboardInterrupt:
        if options.debug:
            raise
        print("torchquant: interrupted", file=sys.stderr)
    except Exception as error:
        if options.debug:
            raise
        print(one_line(error), file=sys.stderr)
    return 1


def one_line(error: Exception) -> str:
    """Some errors, those of operators among them, bring a stack of C++ frames after an empty line or several lines."""
    text = " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
    if isinstance(error, KeyError):
        text = f"KeyError: {text}"
    return text if text.startswith("torchquant:") else f"torchquant: {text}"


def build_parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common.add_argument("-v", "--verbose", action="store_true", help="show what is being done, layer by layer")
    parser = argparse.ArgumentParser(prog="torchquant", description="Low-bit weights for trained PyTorch models.")
    commands = parser.add_subparsers(required=True, metavar="demo | quantize | report | diagnose")
    add_demo(commands.add_parser("demo", parents=[common], help="quantize three real networks and compare the methods"))
    add_quantize(commands.add_parser("quantize", parents=[common], help="quantize a model of yours and save it"))
    add_report(commands.add_parser("report", parents=[common], help="show a report, or make its HTML page"))
    facts = commands.add_parser("diagnose", parents=[common], help="versions, build, CPU tiers, devices")
    facts.set_defaults(run=lambda options: print(diagnose.as_text(diagnose.facts())) or 0)
    return parser


def add_demo(parser: argparse.ArgumentParser) -> None:
    from .demo import NETWORKS

    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder of the report (default demo-out)")
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="some of the networks")
    parser.add_argument("--bits", nargs="+", type=int, choices=range(2, 9), metavar="BITS", help="widths to try")
    parser.add_argument("--sr", action="store_true", help="instead: activations of a super-resolution network, in dB")
    parser.add_argument("--vit", action="store_true", help="instead: a vision transformer at W3A3 and W4A4")
    parser.add_argument("--quick", action="store_true", help="train for a few steps only: a smoke test")
    parser.set_defaults(run=run_demo)


def run_demo(options: argparse.Namespace) -> int:
    if options.sr:
        from .demo import compare_super_resolution as sr

        return 0 if sr.run(options.out, bits=options.bits or sr.BITS, quick=options.quick) else 1
    if options.vit:
        from .demo import compare_vit as vit

        schemes = [f"W{bits}A{bits}" for bits in options.bits or (3, 4)]
        return 0 if vit.run(options.out, schemes=schemes, quick=options.quick) else 1
    from .demo import run

    return 0 if run(options.out, networks=options.only, bits=options.bits or [4, 3, 2], quick=options.quick) else 1


def add_quantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="module:factory (called without arguments) or a Hugging Face directory")
    parser.add_argument(
        "--scheme", type=usage(Scheme.parse), default="W4A16", help="W<bits>A16[g<group size>][-sym][-intscale]"
    )
    parser.add_argument("--method", type=usage(checked_method), default="auto", help="auto, rtn, gptq, gptq+comq ...")
    parser.add_argument("--effort", choices=EFFORTS, default="standard", help="what auto may cost")
    parser.add_argument("--calib", type=Path, metavar="FILE", help=".pt, .npy, .safetensors of inputs, or text")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the quantized model is saved")
    parser.add_argument("--report", type=Path, metavar="FILE.html", help="also write the HTML report")
    parser.add_argument(
        "--ignore", nargs="+", default=[], metavar="PATTERN", help="names, re: patterns or classes to leave"
    )
    parser.add_argument("--override", nargs="+", type=usage(override), default=[], metavar="PATTERN=SCHEME")
    parser.add_argument("--inputs", choices=("float", "quantized"), default="float")
    parser.add_argument("--byte-level", action="store_true", help="the tokens of a text are its bytes")
    parser.add_argument("--sequence-length", type=int, default=512, metavar="TOKENS", help="of a piece of text")
    parser.add_argument("--samples", type=int, default=128, help="pieces of text at most")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strict", action="store_true", help="fail if a layer would stay in floating point")
    parser.set_defaults(run=run_quantize)


def run_quantize(options: argparse.Namespace) -> int:
    from . import quantize_, save

    if options.calib is None and options.method != "rtn":
        print(f"torchquant: --method {options.method} needs --calib FILE; only rtn goes without", file=sys.stderr)
        return 2
    batches = None
    model = cli_inputs.load_model(options.model).eval()
    if options.calib is not None:
        batches = cli_inputs.load_calibration(
            options.calib, options.model, byte_level=options.byte_level, length=options.sequence_length,
            samples=options.samples, batch=options.batch_size,
        )  # fmt: skip
    report = quantize_(
        model, options.scheme, batches, method=options.method, effort=options.effort, overrides=dict(options.override),
        ignore=options.ignore, inputs=options.inputs, strict=options.strict, seed=options.seed,
        progress=sys.stderr.isatty(),
    )  # fmt: skip
    print(report)
    save(model, options.out)
    report.to_json(options.out / "report.json")
    if options.report is not None:
        report.to_html(options.report)
    return 0


def add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="report.json as quantize writes it")
    parser.add_argument("--html", type=Path, metavar="FILE.html", help="write the page instead of printing the table")
    parser.set_defaults(run=run_report)


def run_report(options: argparse.Namespace) -> int:
    report = Report.from_json(options.file)
    if options.html is None:
        print(report)
    else:
        report.to_html(options.html)
        print(f"wrote {options.html}")
    return 0


def usage(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Makes a ValueError's text argparse's own: wrong usage, exit code 2."""

    def convert(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def checked_method(text: str) -> str:
    return method_name(parse_method(text))


def override(text: str) -> tuple[str, Scheme | None]:
    """``PATTERN=SCHEME``, or ``PATTERN=none`` to leave a layer as it is. A pattern may hold a ``=`` itself."""
    pattern, equals, scheme = text.rpartition("=")
    if not equals:
        raise ValueError(f"expected PATTERN=SCHEME, got {text!r}")
    return pattern, None if scheme == "none" else Scheme.parse(scheme)
