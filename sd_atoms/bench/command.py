"""The words of `sd-atoms bench`."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the sub-commands step, serve, decompose, sparse and forms."""
    commands = parser.add_subparsers(
        dest="bench_command", required=True, metavar="{step,serve,decompose,sparse,forms}"
    )

    step = commands.add_parser("step", help="a training step per method: seconds, memory, trained numbers")
    _add_arch(step)
    _add_common(step)
    _add_workload(step)
    step.add_argument(
        "--methods",
        default="floor,atoms,lora-conv,loha-conv,lokr-conv,lora-attn,naive",
        help="comma-separated; also atoms-weight, atoms-activation, atoms-split, atoms-9-4 (default: %(default)s)",
    )
    step.add_argument("--steps", type=_positive, default=2, help="steps per run, after one warm-up (default: 2)")

    serve = commands.add_parser("serve", help="a denoising step with adapters unmerged and merged, and a hot-swap")
    _add_arch(serve)
    _add_common(serve)
    serve.add_argument("--resolution", type=_positive, help="pixels (default: the architecture's own)")
    serve.add_argument("--steps", type=_positive, default=2, help="denoising steps per round (default: 2)")
    _add_device(serve)

    decompose = commands.add_parser("decompose", help="the svd solver over every convolution")
    _add_arch(decompose)
    _add_common(decompose)

    sparse = commands.add_parser("sparse", help="the sparse solver against coordinate descent, on one convolution")
    sparse.add_argument("--channels", type=_positive, default=1280, help="in and out (default: %(default)s)")
    sparse.add_argument("--m", type=_positive, default=9, help="atoms (default: %(default)s)")
    sparse.add_argument("--l1", type=float, default=1e-3, help="weight of the L1 penalty (default: %(default)s)")
    _add_common(sparse)

    forms = commands.add_parser("forms", help="the forms of an adapted convolution, per layer shape")
    _add_arch(forms)
    _add_common(forms)
    _add_workload(forms)


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints a table, then writes the JSON file asked for.

    Raises:
        UserError: a value cannot be used, or the JSON file cannot be written.
    """
    from sd_atoms.files import write_json
    from sd_atoms.machine import usable_cores

    threads = arguments.threads or usable_cores()
    if arguments.bench_command == "decompose":
        from sd_atoms.bench.decompose import bench_decompose, decompose_text

        result = bench_decompose(arguments.arch, arguments.rounds, threads)
        text = decompose_text(result)
    elif arguments.bench_command == "sparse":
        from sd_atoms.bench.sparse import bench_sparse, sparse_text

        result = bench_sparse(arguments.channels, arguments.m, arguments.l1, arguments.rounds, threads)
        text = sparse_text(result)
    elif arguments.bench_command == "serve":
        from sd_atoms.bench.serve import bench_serve, serve_text

        result = bench_serve(
            arguments.arch,
            arguments.resolution,
            arguments.rounds,
            arguments.steps,
            threads,
            arguments.device,
            arguments.dtype,
        )
        text = serve_text(result)
    else:
        workload = dict(
            arch=arguments.arch,
            resolution_px=arguments.resolution,
            batch_size=arguments.batch_size,
            rounds=arguments.rounds,
            threads=threads,
            device=arguments.device,
            dtype=arguments.dtype,
        )
        if arguments.bench_command == "step":
            from sd_atoms.bench.methods import parse_methods
            from sd_atoms.bench.step import bench_step, step_text

            result = bench_step(methods=parse_methods(arguments.methods), steps=arguments.steps, **workload)
            text = step_text(result)
        else:
            from sd_atoms.bench.forms import bench_forms, forms_text

            result = bench_forms(**workload)
            text = forms_text(result)
    print(text)
    if arguments.json:
        write_json(arguments.json, result)


def _add_arch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", choices=("sd-v1-4", "pocket"), default="sd-v1-4", help="(default: %(default)s)")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=_positive, default=3, help="how often all is measured (default: 3)")
    parser.add_argument("--threads", type=_positive, help="CPU threads (default: all cores)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")


def _add_workload(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resolution", type=_positive, default=256, help="pixels (default: 256)")
    parser.add_argument("--batch_size", type=_positive, default=1, help="(default: 1)")
    _add_device(parser)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="(default: fp32)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: an integer from 1 on is allowed")
    return int(text)
