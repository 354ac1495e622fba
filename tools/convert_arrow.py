"""Training data of a fork in Arrow folders (part_0, part_1, ..., as its convert_to_arrow scripts save them) to pairs.

A row there is a pair already: text ids, codes and emotion vector of a clip, and the condition of another clip of its
speaker (its own, where the speaker has no other). Every 100th row is for validation. Needs pyarrow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tools._common import Progress, ToolError, atomic_path, info, make_parser, run_program, write_jsonl, writing_to

FIRST_COMMAND = "python -m tools.convert_arrow --input train_data --output-dir build/arrays"
KINDS = {"text_ids": "target_text_ids", "codes": "target_codes", "condition": "prompt_condition",
         "emo_vec": "target_emo_vec"}


def batches_of(folder: Path) -> Iterator[dict[str, Any]]:
    """Every record batch, its columns by name. Raises: ToolError for what is not of the kind, naming the file."""
    try:
        import pyarrow
    except ImportError as error:
        raise ToolError("reading Arrow folders needs pyarrow: pip install pyarrow") from error
    files = sorted(folder.glob("part_*/*.arrow"), key=lambda path: (len(path.parent.name), path))
    if not files:
        raise ToolError(f"{folder}: holds no part_0, part_1, ... with .arrow files. Give the folder of these")
    for path in files:
        try:
            with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as reader:
                yield from ({kind: batch.column(kind) for kind in KINDS} for batch in reader)
        except (pyarrow.ArrowException, OSError, KeyError) as error:  # KeyError: another table
            raise ToolError(f"{path}: cannot be read ({str(error).strip()}). Convert that part again") from error


def convert(folder: Path, output_dir: Path) -> list[dict[str, Any]]:
    """Writes an array of each of KINDS, and returns the rows of their manifest."""
    lengths: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for kind, column in (item for batch in batches_of(folder) for item in batch.items()):
        lengths[kind] += column.value_lengths().to_pylist()
    count, dim = len(lengths["codes"]), max(lengths["emo_vec"], default=0)
    if not count or {*lengths["emo_vec"], *lengths["condition"]} - {dim, 32} or min(map(min, lengths.values())) < 1:
        raise ToolError(f"{folder}: rows without codes, 32 conditions or an emotion vector. Convert it again")
    starts = {kind: np.cumsum([0, *(lengths[kind] if kind != "emo_vec" else [1] * count)]).tolist() for kind in KINDS}
    shapes = {kind: (ends[-1],) if kind in ("text_ids", "codes") else (ends[-1], dim) for kind, ends in starts.items()}
    at, progress = dict.fromkeys(KINDS, 0), Progress("rows", count)
    with contextlib.ExitStack() as files:
        arrays = {kind: np.lib.format.open_memmap(files.enter_context(atomic_path(output_dir / f"{kind}.npy")), "w+",
                                                  np.dtype(np.float16 if len(shape) == 2 else np.int32), shape)
                  for kind, shape in shapes.items()}
        for batch in batches_of(folder):
            for kind, column in batch.items():
                values = (column.flatten().flatten() if kind == "condition" else column.flatten()).to_numpy(False)
                end = at[kind] + len(values) // (dim if len(shapes[kind]) == 2 else 1)
                arrays[kind][at[kind] : end], at[kind] = values.reshape(-1, *shapes[kind][1:]), end
            progress.update(at["emo_vec"])
    return [{"id": f"row{i}", "target_text_len": lengths["text_ids"][i], "target_code_len": lengths["codes"][i],
             **{f"{key}_path": f"{kind}.npy" for kind, key in KINDS.items()},
             **{f"{key}_start": starts[kind][i] for kind, key in KINDS.items()}} for i in range(count)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, FIRST_COMMAND)
    parser.add_argument("--input", type=Path, required=True, help="the folder of part_0, part_1, ...")
    parser.add_argument("--output-dir", type=Path, required=True, help="gets four arrays and two manifests")
    args = parser.parse_args(argv)
    with writing_to(args.output_dir):
        rows = convert(args.input, args.output_dir)
        write_jsonl(args.output_dir / "train_pairs.jsonl", (row for i, row in enumerate(rows) if i % 100))
        write_jsonl(args.output_dir / "val_pairs.jsonl", rows[::100])
    info(f"{len(rows)} pairs -> {args.output_dir}")


if __name__ == "__main__":
    run_program(main)
