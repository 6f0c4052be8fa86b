"""The command line: ``headway probe | plan | apply | compare | claims | methods | show | doctor``."""

from __future__ import annotations

import inspect
import json
import sqlite3
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.table import Table

app = typer.Typer(
    help="See how signals move through a PyTorch model, change it with a published technique, prove that it helped.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()
Json = Annotated[bool, typer.Option("--json", help="Print plain data instead of a table.")]
ModelName = Annotated[str, typer.Argument(help="pkg.module:factory, or a local Hugging Face folder.")]
Techniques = Annotated[list[str], typer.Argument(help='Techniques by key: peri-ln, "mix-ln(alpha=0.5)", ...')]


def _print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=2, default=str) + "\n")


def _techniques(keys: list[str]) -> list[Any]:
    from headway.catalogue import technique

    return [technique(key) for key in keys]


@app.command()
def probe(
    model: ModelName,
    save: Annotated[Path | None, typer.Option(help="Write the HTML page there.")] = None,
    batch: Annotated[
        str | None, typer.Option(help="A task whose batch and loss are taken: digits, stdlib-text, ...")
    ] = None,
    as_json: Json = False,
) -> None:
    """See what every layer does to the signal and to its gradient."""
    from headway.models import load_model
    from headway.signals.probe import probe as run
    from headway.tasks.task import get
    from headway.trials.probing import flow_of

    loaded, given = load_model(model)
    if batch is not None:
        flow = flow_of(loaded, get(batch))
    elif given is not None:
        flow = run(loaded, given)
    else:
        raise ValueError(
            f"{model} returned a model without a batch; let the factory return (model, batch), or name a task: --batch digits"
        )
    if save is not None:
        flow.save(save)
    if as_json:
        _print_json(flow.to_dict())
    else:
        out.print(escape(str(flow)), soft_wrap=True, highlight=False)
        if save is not None:
            out.print(f"The page: {save.resolve()}", soft_wrap=True, highlight=False)


@app.command()
def plan(model: ModelName, techniques: Techniques, as_json: Json = False) -> None:
    """Show which modules techniques would change, without changing anything."""
    from headway.models import load_model
    from headway.surgery import plan as run

    answer = run(load_model(model)[0], *_techniques(techniques))
    if as_json:
        _print_json(answer.to_dict())
        return
    table = Table("module", "before", "after", "technique")
    for row in answer.rows:
        table.add_row(*(escape(text) for text in (row.name or "(the model)", row.before, row.after, row.technique)))
    out.print(table)
    out.print(f"{len(answer.rows)} changes; parameters {answer.parameters_before:,} -> {answer.parameters_after:,}")


@app.command()
def apply(
    model: ModelName,
    techniques: Techniques,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder (Hugging Face) or .safetensors file to write.")
    ],
) -> None:
    """Change a model and write it to disk."""
    from headway.models import load_model
    from headway.surgery import apply as run
    from headway.surgery import history

    loaded = run(load_model(model)[0], *_techniques(techniques))
    if hasattr(loaded, "save_pretrained"):
        loaded.save_pretrained(output)  # type: ignore[operator]
    else:
        from safetensors.torch import save_model

        output.parent.mkdir(parents=True, exist_ok=True)
        part = output.with_name(f".{output.name}.part")
        save_model(loaded, str(part))
        part.replace(output)
    out.print(escape(str(history(loaded)[-1])), soft_wrap=True, highlight=False)
    out.print(f"Written to {output.resolve()}", soft_wrap=True, highlight=False)


@app.command()
def compare(
    task: Annotated[
        str | None, typer.Argument(help='"stdlib-text(depth=12)", digits, pkg.module:make_task, ...')
    ] = None,
    arms: Annotated[list[str] | None, typer.Option("--arms", "-a", help="baseline,peri-ln,a+b; or repeat.")] = None,
    seeds: Annotated[str | None, typer.Option(help="How many seeds (3), or which (0,4,7).")] = None,
    budget: Annotated[str | None, typer.Option(help='Of each run: "200 steps" or "60s".')] = None,
    store: Annotated[Path, typer.Option(help="The SQLite file of the runs.")] = Path("runs/compare.sqlite"),
    report: Annotated[Path | None, typer.Option(help="Where the HTML report goes.")] = Path("runs/compare.html"),
    batch_size: Annotated[int | None, typer.Option(help="Samples a step; the task's own by default.")] = None,
    engine: Annotated[str, typer.Option(help="local or ray.")] = "local",
    precision: Annotated[str, typer.Option(help="fp32 or bf16 (autocast).")] = "fp32",
    as_json: Json = False,
) -> None:
    """Prove it: the same task and seeds, several arms, side by side. Without arguments, the comparison of the README."""
    from headway.trials import presets

    if task is not None and not arms:
        raise ValueError("name the arms to compare, e.g. --arms baseline --arms peri-ln, or leave out the task too")
    changes: dict[str, Any] = {
        "task": task,
        "arms": ",".join(arms) if arms else None,
        "seeds": None if seeds is None else _seeds(seeds),
        "budget": budget,
        "batch_size": batch_size,
    }
    changes = {key: value for key, value in changes.items() if value is not None}
    if task is not None and budget is None:
        changes["budget"] = None
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
    if as_json:
        from headway.trials.compare import compare as run

        settings = {**presets.MAIN, **changes, "progress": False}
        _print_json(run(**settings, store=store, report=report, engine=engine, precision=precision).to_dict())  # type: ignore[arg-type]
    else:
        presets.main(store, report, engine=engine, precision=precision, **changes)


def _seeds(text: str) -> int | list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--seeds takes a number, or numbers with commas between; {text!r} was given") from None
    return numbers if "," in text else numbers[0]


@app.command()
def claims(
    keys: Annotated[list[str] | None, typer.Argument(help="Systems by key; all of them by default.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="At most half a minute a system.")] = False,
    list_only: Annotated[
        bool, typer.Option("--list", help="Only name the systems whose claims can be measured.")
    ] = False,
    save: Annotated[Path, typer.Option("--html", "--save", help="The HTML scoreboard.")] = Path("scoreboard.html"),
    as_json: Json = False,
) -> None:
    """Measure what papers claim, on this machine."""
    from headway.catalogue import method, methods
    from headway.claims.measure import measure_all, measured_keys
    from headway.claims.scoreboard import scoreboard
    from headway.trials.facts import machine, versions

    chosen = list(dict.fromkeys(method(key).key for key in keys)) if keys else measured_keys(m.key for m in methods())
    if missing := [key for key in chosen if not measured_keys([key])]:
        raise ValueError(
            f"no claims are measured for {', '.join(missing)}; `headway claims --list` names those that are"
        )
    if list_only:
        _print_json(chosen) if as_json else out.print("\n".join(chosen))
        return
    command = " ".join(["headway claims", *(keys or []), *(["--quick"] if quick else [])])
    save.parent.mkdir(parents=True, exist_ok=True)
    systems = []
    colours = {"holds": "green", "partly": "yellow", "does not hold here": "red"}
    table = Table("claim", "paper", "measured here", "verdict", show_lines=True)
    for system in measure_all(chosen, quick):
        systems.append(system)
        # after every system, so that stopping the command loses nothing that was measured
        scoreboard(systems, save, quick, command)
        if not as_json:
            told = escape(system.error) or ", ".join(e.verdict for e in system.evidence)
            out.print(f"{system.key}: {system.seconds:.1f} s; {told}", soft_wrap=True, highlight=False)
        for e in system.evidence:
            verdict = f"[{colours[e.verdict]}]{e.verdict}[/]: {escape(e.why)}"
            table.add_row(f"[bold]{e.key}[/]: {escape(e.claim)}", escape(e.paper), escape(e.measured), verdict)
    if as_json:
        plain = {"quick": quick, "command": command, "machine": machine(), "versions": versions()}
        _print_json({**plain, "systems": [system.to_dict() for system in systems]})
    else:
        out.print(table)
        out.print(f"The scoreboard: {save.resolve()}", soft_wrap=True, highlight=False)
    if failed := [system.key for system in systems if system.error]:
        raise RuntimeError(f"the claims of {', '.join(failed)} could not be measured; the scoreboard says why")


@app.command()
def methods(as_json: Json = False) -> None:
    """List every technique and tool."""
    from headway.catalogue import methods as rows

    if as_json:
        _print_json([row.to_dict() for row in rows()])
        return
    table = Table("key", "what", "takes", "when", "paper")
    for row in rows():
        table.add_row(row.key, row.name, row.takes, row.use, f"{row.year}, arXiv {row.arxiv}")
    out.print(table)


@app.command()
def show(key: Annotated[str, typer.Argument(help="A key of `headway methods`.")]) -> None:
    """Explain one technique: what it does, its settings, its paper."""
    import importlib

    import torch

    from headway.catalogue import method

    row = method(key)
    text = [
        f"# {row.name}",
        f"*{row.paper}*, {row.year}, arXiv {row.arxiv}",
        f"**Takes** {row.takes}. **Use** {row.use}.",
    ]
    text.append("```\n" + (inspect.getdoc(importlib.import_module(row.see)) or "") + "\n```")
    if row.technique is not None:
        module, _, name = row.technique.partition(":")
        kind = getattr(importlib.import_module(module), name)
        text.append(f"```\n{name}{inspect.signature(kind)}\n\n{inspect.getdoc(kind) or ''}\n```")
        call = f'model = hw.apply(model, hw.technique("{row.key}"))'
        if issubclass(kind, torch.optim.Optimizer):
            call = f"optimizer = hw.optim.{name}(model.parameters(), lr=1e-3)"
        text.append(f"```python\nimport headway as hw\n{call}\n```")
    out.print(Markdown("\n\n".join(text)))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Report what this machine offers and what it loses."""
    from headway.doctor import examine

    found = examine()
    if as_json:
        _print_json(found)
        return
    table = Table(show_header=False)
    table.add_row("processor", f"{found['processor']}, {found['cores']} cores, {found['threads']} threads for torch")
    table.add_row("instruction sets", ", ".join(name for name, has in found["features"].items() if has) or "not told")
    table.add_row("CUDA", "yes" if found["cuda"] else "no")
    table.add_row("C++ compiler", found["compiler"] or "none: plain PyTorch is used instead of the kernels")
    table.add_row(
        "kernels", ", ".join(f"{name} {'built' if ok else 'NOT built'}" for name, ok in found["kernels"].items())
    )
    faults = found["page_faults"]
    table.add_row(
        "64 MiB result",
        f"{faults['reused_ms']:.1f} ms in memory in use, {faults['fresh_ms']:.1f} ms fresh: {faults['slowdown']:.1f}x",
    )
    table.add_row("versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version))
    out.print(table)
    for sentence in found["advice"]:
        out.print(f"[yellow]*[/] {escape(sentence)}")


def main() -> None:
    """Runs the command line; an error the user can mend is one sentence on standard error and exit status 2."""
    try:
        app()
    except KeyboardInterrupt as stop:
        Console(stderr=True).print(escape(str(stop) or "stopped"), soft_wrap=True, highlight=False)
        raise SystemExit(130) from None
    except (ValueError, TypeError, OSError, KeyError, RuntimeError, ImportError, sqlite3.Error) as error:
        # a KeyError shows its message in quotes
        words = error.args[0] if isinstance(error, KeyError) and error.args else error
        Console(stderr=True).print(f"headway: {escape(str(words))}", soft_wrap=True, highlight=False)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
