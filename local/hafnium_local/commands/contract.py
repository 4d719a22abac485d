"""`hafnium contract check | docs | schema`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hafnium_contract.contract_file import load_contract
from hafnium_contract.documentation import contract_markdown
from hafnium_contract.errors import ContractError
from hafnium_contract.model_contract import ModelContract
from hafnium_local.console import fail, print_json

app = typer.Typer(no_args_is_help=True, help="Look at a model contract: the file that names every feature once.")

File = Annotated[Path, typer.Argument(help="The contract, a YAML file.", show_default=False)]


@app.command()
def check(
    file: File, as_json: Annotated[bool, typer.Option("--json", help="Answer as JSON.")] = False,
) -> None:
    """Is the contract as it should be? Each problem comes with its line and what was expected.

    Exit status: 0 it is, 1 it is not, 2 the file can't be read.

    Example: hafnium contract check examples/unified-risk/contract.yaml
    """
    try:
        contract = load_contract(file)
    except ContractError as e:
        if as_json:
            problems = [{"line": p.line, "path": p.path, "message": p.message} for p in e.problems]
            print_json({"valid": False, "file": str(file), "problems": problems})
        else:
            fail(str(e))
        raise typer.Exit(1) from e
    if as_json:
        print_json({"valid": True, "file": str(file), "name": contract.name, "digest": contract.digest,
                    "inputs": list(contract.input_names)})
    else:
        typer.echo(f"{file}: valid; {contract.name} {contract.version}, {len(contract.inputs)} inputs, {contract.digest}")


@app.command()
def docs(
    file: File,
    out: Annotated[Path | None, typer.Option(help="Write there instead of to standard output.", show_default=False)] = None,
) -> None:
    """Feature documentation in Markdown: type, unit, range, source, owner, direction, personal or not.

    Example: hafnium contract docs examples/unified-risk/contract.yaml --out features.md
    """
    text = contract_markdown(load_contract(file))
    if out is None:
        typer.echo(text, nl=False)
    else:
        out.write_text(text, encoding="utf-8")


@app.command()
def schema() -> None:
    """JSON Schema of a contract, for editors and for checks elsewhere.

    Example: hafnium contract schema > contract.schema.json
    """
    print_json(ModelContract.model_json_schema(by_alias=True))
