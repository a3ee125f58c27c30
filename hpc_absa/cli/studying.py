"""Commands that study a model through its Hessian: attacks, quantization, large-batch analysis."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from hpc_absa.cli.options import Json, Overrides
from hpc_absa.errors import UsageError

if TYPE_CHECKING:
    from hpc_absa.training.load import Source

Checkpoint = Annotated[
    Path,
    Argument(
        metavar="CHECKPOINT",
        help="A run's .h5 file, a run directory, or with --weights a job file.",
    ),
]
Root = Annotated[str | None, Option(help="Folder of the data set (data.root).")]
Weights = Annotated[
    Path | None,
    Option(metavar="FILE", help="Weights in .npz, .safetensors or .pt in place of a checkpoint's."),
]
Mean = Annotated[
    str | None, Option(metavar="A,B,C", help="Mean of each channel that --weights expect.")
]
Std = Annotated[
    str | None, Option(metavar="A,B,C", help="Standard deviations that --weights expect.")
]


def attack(
    checkpoint: Checkpoint,
    attacks: Annotated[
        str | None,
        Option(
            metavar="A,B",
            help="Of fgsm, pgd, pgd-l2, tr-{l2,linf}-{easy,hard}[-fixed]; or all. "
            "Default: fgsm, pgd and the adaptive tr-….",
        ),
    ] = None,
    samples: Annotated[int, Option(min=1, help="Test samples, at equal distances.")] = 200,
    epsilon: Annotated[
        str, Option(metavar="A,B", help="ε of fgsm and pgd in 255ths of a pixel's range.")
    ] = "2,8",
    steps: Annotated[int, Option(min=1, help="Steps of pgd, each ε/4 long.")] = 10,
    radius: Annotated[float, Option(help="First trust radius, in units of the inputs.")] = 1e-3,
    iterations: Annotated[int, Option(min=1, help="Steps of a trust-region attack.")] = 400,
    reference: Annotated[
        bool, Option("--reference", help="Adapt the radius as the authors' code does.")
    ] = False,
    root: Root = None,
    weights: Weights = None,
    mean: Mean = None,
    std: Std = None,
    overrides: Overrides = None,
    out: Annotated[Path | None, Option(help="Write OUT.png, a figure with examples.")] = None,
    as_json: Json = False,
) -> int:
    """Measure a model's accuracy under FGSM, PGD and the trust-region attack.

    Runs alone or on several ranks. Example: `mpirun -np 2 hpc-absa attack runs/digits`
    """
    from hpc_absa.adversarial.robustness import DEFAULT, NAMES, Options
    from hpc_absa.training import attack as command

    named = {None: DEFAULT, "all": NAMES}.get(attacks) or _words(attacks or "")
    options = Options(
        named, samples, _numbers("--epsilon", epsilon), steps, radius, iterations, reference
    )
    source = _source(checkpoint, root, weights, mean, std, overrides)
    return command.attack(source, out, as_json, options)


def quantize(
    checkpoint: Checkpoint,
    bits: Annotated[str, Option(metavar="A,B", help="Choices of bits, ascending.")] = "4,8",
    size: Annotated[
        str | None,
        Option(metavar="LIMIT", help="A share of the range such as 0.5 (default), or 1.2MB."),
    ] = None,
    bops: Annotated[
        str | None, Option(metavar="LIMIT", help="Bit operations: a share, or 3.1G.")
    ] = None,
    latency: Annotated[str | None, Option(metavar="LIMIT", help="A share, or 12ms.")] = None,
    latency_table: Annotated[
        Path | None,
        Option(metavar="FILE", help="Latencies in ms by layer and bits (docs/quantization.md)."),
    ] = None,
    samples: Annotated[int, Option(min=1, help="Training samples for traces and ranges.")] = 256,
    matvecs: Annotated[int, Option(min=6, help="Products for the trace of a layer.")] = 12,
    test_samples: Annotated[
        int | None, Option(min=1, help="Test samples, at equal distances; default all.")
    ] = None,
    check: Annotated[
        int,
        Option(min=0, metavar="N", help="Compare Ω with losses, and with N random allocations."),
    ] = 0,
    finetune: Annotated[
        int, Option(min=0, metavar="EPOCHS", help="Train the quantized network for some epochs.")
    ] = 0,
    lr: Annotated[float, Option(help="Learning rate of --finetune.")] = 1e-4,
    root: Root = None,
    weights: Weights = None,
    mean: Mean = None,
    std: Std = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        Option(help="Write OUT.json (allocation), OUT.npz (network), OUT.png, OUT-finetuned/."),
    ] = None,
    as_json: Json = False,
) -> int:
    """Choose the bits of each layer by the Hessian (HAWQ), and measure the quantized network.

    Runs alone or on several ranks. Example: `hpc-absa quantize runs/digits --size 0.25`
    """
    widths = _numbers("--bits", bits)
    if not all(width.is_integer() for width in widths):
        raise UsageError(f"--bits {bits!r}: expected whole numbers with commas between them: 4,8")
    from hpc_absa.training import quantize as command

    given = {"size": size, "bops": bops, "latency": latency}
    limits = tuple((cost, text) for cost, text in given.items() if text is not None)
    options = command.Options(
        tuple(map(int, widths)),
        limits or (("size", "0.5"),),
        latencies=latency_table,
        samples=samples,
        matvecs=matvecs,
        test_samples=test_samples,
        check=check,
        finetune=finetune,
        lr=lr,
    )
    source = _source(checkpoint, root, weights, mean, std, overrides)
    return command.quantize(source, out, as_json, options)


def analyse(
    directories: Annotated[list[Path], Argument(metavar="D...", help="Run directories.")],
    out: Annotated[
        Path, Option(help="Folder for results; a stopped analysis continues there.")
    ] = Path("analysis"),
    samples: Annotated[int, Option(min=1, help="Training samples of the Hessian.")] = 256,
    k: Annotated[int, Option("--k", min=1, help="Number of top eigenvalues.")] = 2,
    surface: Annotated[
        int, Option(min=0, metavar="N", help="Loss on N × N points along the top eigenvectors.")
    ] = 0,
    attacks: Annotated[
        str, Option(metavar="A,B", help="As for `hpc-absa attack`; an empty text: none.")
    ] = "fgsm,pgd,tr-l2-easy",
    attack_samples: Annotated[int, Option(min=1, help="Test samples that are attacked.")] = 200,
    epsilon: Annotated[
        str, Option(metavar="A,B", help="ε of fgsm and pgd in 255ths of a pixel's range.")
    ] = "2",
    last: Annotated[bool, Option("--last", help="Only the newest checkpoint of each run.")] = False,
    root: Root = None,
    as_json: Json = False,
) -> int:
    """Measure curvature and robustness at every kept checkpoint: the study of large batches.

    Top eigenvalues, trace, density, share of negative eigenvalues, the loss along the top
    eigenvectors, and accuracy under attack, as a table and a figure.
    Example: `hpc-absa analyse runs/bl-64 runs/bl-1024 --out analysis`
    """
    from hpc_absa.training import analyse as command

    options = command.Options(
        samples,
        k,
        surface=surface,
        attacks=_words(attacks),
        attack_samples=attack_samples,
        epsilons=_numbers("--epsilon", epsilon),
        last=last,
    )
    return command.analyse(directories, root, out, as_json, options)


def _source(
    path: Path,
    root: str | None,
    weights: Path | None,
    mean: str | None,
    std: str | None,
    overrides: list[str] | None,
) -> Source:
    from hpc_absa.training.load import Source

    means, stds = (_numbers(name, text) if text else () for name, text in
                   (("--mean", mean), ("--std", std)))  # fmt: skip
    return Source(path, root, weights, means, stds, tuple(overrides or ()))


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(word) for word in _words(text))
    except ValueError:
        numbers = ()
    if not numbers:
        raise UsageError(f"{option} {text!r}: expected numbers with commas between them")
    return numbers
