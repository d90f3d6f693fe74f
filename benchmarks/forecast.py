"""Whether losses can be forecast: sweeps of small trained models, the curve fitted on them, and its test on the model
that was left out.

    python benchmarks/forecast.py                        # the bundled demo model
    python benchmarks/forecast.py shared=build/shared/model fine=build/fine/model    # and siblings, by name
    python benchmarks/forecast.py --render               # tables and the plot again from docs/forecast.json

Siblings are made by `python -m llmcompressor_moe.demo.train --kind shared --steps 1300 --cache ... --output ...`, and
the same with `--kind fine`. Sweeps are kept below build/forecast and go on where they stopped. Writes docs/forecast.json,
the tables of docs/forecast.md, docs/forecast.png, and the calibration that the package comes with.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from llmcompressor_moe.checkpoint.files import write_text
from llmcompressor_moe.demo import DEMO_MODEL
from llmcompressor_moe.evaluation.run import EvaluationSettings
from llmcompressor_moe.evidence.gather import model_shape
from llmcompressor_moe.outlook.calibration import Calibration, Observation, fit, fit_curve
from llmcompressor_moe.outlook.damage import Damage, first_order_damage
from llmcompressor_moe.outlook.predict import CONFIDENCE, predict_loss
from llmcompressor_moe.outlook.report import PointForecast, safe_up_to
from llmcompressor_moe.quantization.schemes import resolve_schemes
from llmcompressor_moe.sweep.choice import Drops
from llmcompressor_moe.sweep.grid import Grid, Point
from llmcompressor_moe.sweep.report import SweepReport
from llmcompressor_moe.sweep.run import SweepSettings, run_sweep

ROOT = Path(__file__).resolve().parent.parent
DOCS, BUILD = ROOT / "docs", ROOT / "build" / "forecast"
CALIBRATION = ROOT / "src" / "llmcompressor_moe" / "outlook" / "calibration.json"
SCHEMES = ["W2A16", "W3A16", "W4A16", "W8A16", "UNQUANTIZED"]
BITS = [3.5, 4.5, 5.5, 6.5, 8.25]
ALLOWED = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
# Standard errors by which the text's own noise may carry a measurement out of an interval.
NOISE = 1.645
KINDS = ("blocks", "layers", "experts", "bits")
SETTINGS = SweepSettings(
    evaluation=EvaluationSettings(max_tokens=16384, length=256, stride=256, batch_size=8, dtype="float32")
)


def grid_of(model: Path) -> Grid:
    """Every kind alone, and some together."""
    shape = model_shape(model, resolve_schemes(SCHEMES, None, "schemes"))
    half = list(range(1, shape.blocks // 2 + 1))
    room = min(room.num_experts - room.floor for room in shape.rooms.values())
    step = max(1, room // 6)
    return Grid(
        points=[
            {"bits": BITS},
            {"blocks": half},
            {"layers": half},
            {"experts": list(range(step, room + 1, step))},
            {"blocks": 1, "experts": step},
            {"layers": 1, "experts": step},
            {"layers": 1, "bits": [3.5, 4.5]},
            {"experts": step, "bits": 3.5},
            {"blocks": 1, "layers": 1, "experts": step, "bits": 4.5},
        ],
        schemes=SCHEMES,
    )


def points_of(report: SweepReport) -> list[dict]:
    """Damage and measured loss of every point that is not the model itself."""
    base = report.base.text
    rows = []
    for result in report.points:
        if result.found is None:
            continue
        damage = first_order_damage(report.evidence, result.dropped, result.schemes)
        text = result.found.text
        rows.append(
            {
                "point": result.point.model_dump(),
                "damage": damage.model_dump(),
                "nll_increase": text.mean_nll - base.mean_nll,
                "kl": result.found.agreement.mean_kl,
                # Of log p - log q under p the variance is 2 KL for small differences.
                "noise": math.sqrt(2 * result.found.agreement.mean_kl / text.tokens),
            }
        )
    return rows


def observations(models: Mapping[str, dict]) -> list[Observation]:
    return [
        Observation(name, Damage(**row["damage"]), row["nll_increase"], row["noise"])
        for name, found in models.items()
        for row in found["points"]
    ]


def measure(models: Mapping[str, Path]) -> dict:
    found = {}
    for name, path in models.items():
        report = run_sweep(
            path, grid_of(path), BUILD / name, SETTINGS, announce=lambda step: print(step, flush=True)
        )
        found[name] = {
            "model_type": report.evidence.model_type,
            "blocks": report.evidence.blocks,
            "experts": len(next(iter(report.evidence.layers.values())).routed_tokens),
            "top_k": next(iter(report.evidence.top_k.values())),
            "perplexity": report.base.text.perplexity,
            "tokens": report.base.text.tokens,
            "points": points_of(report),
        }
    return judge({"models": found})


def judge(found: dict) -> dict:
    """Fit on all; test on each model with the curve of the others (with one model alone: with its own)."""
    models = found["models"]
    everything = observations(models)
    names = ", ".join(models)
    found["calibration"] = fit(everything, f"benchmarks/forecast.py on {names}").model_dump()
    found["left_out"] = len(models) > 1
    found["alternatives"] = alternatives(everything) if found["left_out"] else {}
    for name, model in models.items():
        others = [one for one in everything if one.model != name] or everything
        calibration = fit(others)
        model["calibration"] = calibration.model_dump()
        model["test"] = test_of(model["points"], calibration)
    return found


def alternatives(everything: Sequence[Observation]) -> dict[str, float]:
    """Other curves: root mean square of log(measured / forecast) over the models that each was not fitted on."""
    usable = [one for one in everything if one.nll_increase > 2 * one.noise]
    found = {}
    for form, fitted in FORMS.items():
        squares = []
        for name in dict.fromkeys(one.model for one in usable):
            curve = fitted([one for one in usable if one.model != name])
            squares += [
                math.log(one.nll_increase / curve(one.damage)) ** 2 for one in usable if one.model == name
            ]
        found[form] = math.sqrt(sum(squares) / len(squares))
    return found


def _whole(damage: Damage) -> float:
    return sum(getattr(damage, kind) for kind in KINDS)


def _one_exponent(points: Sequence[Observation]) -> Callable[[Damage], float]:
    factors, exponent = fit_curve(points)
    return lambda damage: sum(factors[kind] * getattr(damage, kind) for kind in KINDS) ** exponent


def _no_exponent(points: Sequence[Observation]) -> Callable[[Damage], float]:
    factors, _ = fit_curve(points, exponent=1.0)
    return lambda damage: sum(factors[kind] * getattr(damage, kind) for kind in KINDS)


def _own_curves(points: Sequence[Observation]) -> Callable[[Damage], float]:
    """log(loss) = a + g log(damage), with a and g per kind, and of their own for points of several kinds."""
    curves = {}
    for group in (*KINDS, "mixed"):
        chosen = [one for one in points if _group(one.damage) == group]
        curves[group] = np.polyfit(
            [math.log(_whole(one.damage)) for one in chosen],
            [math.log(one.nll_increase) for one in chosen],
            1,
        )
    return lambda damage: math.exp(np.polyval(curves[_group(damage)], math.log(_whole(damage))))


def _group(damage: Damage) -> str:
    return damage.kinds[0] if len(damage.kinds) == 1 else "mixed"


FORMS: dict[str, Callable[[Sequence[Observation]], Callable[[Damage], float]]] = {
    "first-order damage as it is": lambda points: _whole,
    "a factor per kind": _no_exponent,
    "a factor per kind, one exponent (used)": _one_exponent,
    "a factor and an exponent per kind, and for combinations": _own_curves,
}


def test_of(rows: Sequence[dict], calibration: Calibration) -> dict:
    """What a calibration says of measured points, beside what was measured."""
    forecasts = []
    for row in rows:
        damage = Damage(**row["damage"])
        row["forecast"] = predict_loss(damage, calibration).model_dump()
        forecasts.append(
            PointForecast(
                point=Point(**row["point"]),
                dropped=Drops(),
                schemes={},
                damage=damage,
                loss=predict_loss(damage, calibration),
            )
        )
    measured = [row["nll_increase"] for row in rows]
    inside = [
        row["forecast"]["nll_low"] - NOISE * row["noise"]
        <= row["nll_increase"]
        <= row["forecast"]["nll_high"] + NOISE * row["noise"]
        for row in rows
    ]
    return {
        "spearman": float(spearmanr([one.loss.nll_increase for one in forecasts], measured).statistic),
        "inside": sum(inside) / len(inside),
        "outside": [str(one.point) for one, within in zip(forecasts, inside, strict=True) if not within],
        "safe": [safety(forecasts, measured, allowed) for allowed in ALLOWED],
    }


def safety(forecasts: Sequence[PointForecast], measured: Sequence[float], allowed: float) -> dict:
    """What is called safe, what would really have been, and what the worst of it really lost."""
    safe = safe_up_to(forecasts, allowed)
    # The same rule on what was measured, as if that had been the forecast.
    known = [
        one.model_copy(update={"loss": one.loss.model_copy(update={"nll_high": loss})})
        for one, loss in zip(forecasts, measured, strict=True)
    ]
    real = safe_up_to(known, allowed)
    lost = {}
    for kind in KINDS:
        amount = getattr(safe, kind)
        if amount:
            position = [one.point for one in forecasts].index(Point(**{kind: amount}))
            lost[kind] = math.expm1(measured[position])
    return {"allowed": allowed, "safe": safe.model_dump(), "possible": real.model_dump(), "lost": lost}


# The page


def render(found: dict) -> None:
    """Write the plot, and the tables between their marks in docs/forecast.md."""
    plot(found)
    page = DOCS / "forecast.md"
    text = page.read_text()
    for name, lines in (
        ("status", _status(found)),
        ("curve", _curve(found)),
        ("alternatives", _alternatives(found)),
        ("models", _models(found)),
        ("safe", _safe(found)),
        ("points", _points(found)),
    ):
        begin = f"<!-- {name}: begin -->"
        before, _, rest = text.partition(begin)
        _, end, after = rest.partition(f"<!-- {name}: end -->")
        text = "\n".join([f"{before}{begin}", *lines, f"{end}{after}"])
    page.write_text(text)


def _status(found: dict) -> list[str]:
    names = list(found["models"])
    if found["left_out"]:
        return [
            "",
            f"The curve was fitted on {len(names)} models ({', '.join(names)}). Every test below forecasts a model "
            "with a curve that was fitted on the **others** alone.",
            "",
        ]
    return [
        "",
        f"**The curve was fitted on one model ({names[0]}) and the tests below are on that same model**: they show "
        "that the form of the curve fits, not that it carries over to other models. `python benchmarks/forecast.py shared=... fine=...` makes the real test once siblings are "
        "trained.",
        "",
    ]


def _curve(found: dict) -> list[str]:
    columns = ["fitted on", *KINDS, "exponent", "spread", "interval"]
    lines = ["", "| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    rows = [("all (what the package uses)", found["calibration"])]
    if found["left_out"]:
        rows += [(f"all but {name}", model["calibration"]) for name, model in found["models"].items()]
    for name, raw in rows:
        calibration = Calibration(**raw)
        reach = predict_loss(Damage(blocks=1.0), calibration)
        factors = [f"{calibration.factors[kind]:.2f}" for kind in KINDS]
        cells = [name, *factors, f"{calibration.exponent:.2f}", f"{calibration.spread:.2f}"]
        cells.append(f"x/÷ {reach.nll_high / reach.nll_increase:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _alternatives(found: dict) -> list[str]:
    if not found["alternatives"]:
        return [""]
    lines = [
        "",
        "Typical error of a forecast, on the model that was left out:",
        "",
        "| curve | error |",
        "| --- | --- |",
    ]
    lines += [f"| {form} | x/÷ {math.exp(error):.2f} |" for form, error in found["alternatives"].items()]
    return [*lines, ""]


def _models(found: dict) -> list[str]:
    columns = ["model", "family", "blocks, experts, top-k", "perplexity", "points", "rank correlation"]
    columns += [f"inside the {CONFIDENCE:.0%} interval"]
    lines = ["", "| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    for name, model in found["models"].items():
        cells = [
            name,
            model["model_type"],
            f"{model['blocks']}, {model['experts']}, {model['top_k']}",
            f"{model['perplexity']:.2f}",
            str(len(model["points"])),
            f"{model['test']['spearman']:.3f}",
            f"{model['test']['inside']:.0%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _safe(found: dict) -> list[str]:
    columns = ["model", "allowed", *KINDS, "most that any of them lost", "kept"]
    lines = ["", "| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    for name, model in found["models"].items():
        for row in model["test"]["safe"]:
            cells = [name, f"{row['allowed']:.0%}"]
            for kind in KINDS:
                said, possible = (_amount(row[which][kind]) for which in ("safe", "possible"))
                cells.append(f"{said} (of {possible})")
            worst = max(row["lost"].values(), default=0.0)
            cells += [f"{worst:.2%}", "yes" if worst <= row["allowed"] else "**no**"]
            lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _amount(value: float | None) -> str:
    return "-" if not value else f"{value:g}"


def _points(found: dict) -> list[str]:
    columns = ["model", "point", "first-order damage", "forecast", "measured"]
    lines = ["", "| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    for name, model in found["models"].items():
        for row in model["points"]:
            forecast = row["forecast"]
            cells = [
                name,
                str(Point(**row["point"])),
                f"{sum(row['damage'].values()):.4f}",
                f"{forecast['nll_increase']:.4f} ({forecast['nll_low']:.4f} to {forecast['nll_high']:.4f})",
                f"{row['nll_increase']:.4f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def plot(found: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = {
        **dict(zip(KINDS, ("tab:blue", "tab:orange", "tab:green", "tab:red"), strict=True)),
        "mixed": "tab:gray",
    }
    markers = "osD^v"
    figure, axis = pyplot.subplots(figsize=(7, 6))
    for marker, (name, model) in zip(markers, found["models"].items(), strict=False):
        for kind, color in colors.items():
            rows = [row for row in model["points"] if _group(Damage(**row["damage"])) == kind]
            rows = [row for row in rows if row["nll_increase"] > NOISE * row["noise"]]
            middle = [row["forecast"]["nll_increase"] for row in rows]
            reach = [
                [m - row["forecast"]["nll_low"] for m, row in zip(middle, rows, strict=True)],
                [row["forecast"]["nll_high"] - m for m, row in zip(middle, rows, strict=True)],
            ]
            axis.errorbar(
                [row["nll_increase"] for row in rows],
                middle,
                yerr=reach,
                fmt=marker,
                color=color,
                markersize=5,
                elinewidth=0.7,
                alpha=0.8,
                label=f"{name}: {kind}",
            )
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="measured increase, nats per token",
        ylabel="forecast, nats per token",
    )
    axis.axline((1, 1), (10, 10), color="black", linewidth=0.8)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, ncols=len(found["models"]))
    figure.tight_layout()
    figure.savefig(DOCS / "forecast.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="NAME=DIRECTORY", help="siblings, beside the demo model")
    parser.add_argument("--render", action="store_true")
    args = parser.parse_args()
    path = DOCS / "forecast.json"
    if args.render:
        found = judge({"models": json.loads(path.read_text())["models"]})
    else:
        torch.set_num_threads(1)
        siblings = {name: Path(folder) for name, _, folder in (text.partition("=") for text in args.models)}
        found = measure({"demo": DEMO_MODEL, **siblings})
    write_text(path, json.dumps(found, indent=1) + "\n")
    write_text(CALIBRATION, json.dumps(found["calibration"], indent=1) + "\n")
    render(found)


if __name__ == "__main__":
    main()
