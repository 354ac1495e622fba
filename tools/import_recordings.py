"""A folder of recordings, as it comes, to recordings.jsonl: what the other programs read.

SOURCE is a folder, a table in it, or one sound. What it is, is found out and said:

  ljspeech, f5-tts, gpt-sovits, filelist   lists of names and texts, parted by | (or a tab, ; or ,)
  common-voice, nemo, jsonl, table         Common Voice TSV, NeMo manifests, JSON lines, CSV or XLSX with named columns
  folder                                   sounds with .txt or .lab, long ones with .srt or .vtt, or sounds alone

Writes into --output-dir:

  recordings.jsonl   a row per utterance: id, text, audio, speaker, language, split, duration; of what part of a longer
                     recording it is: source, start
  audio/             the sounds: a link to the source's file (a copy where links are not possible), or a FLAC clip of
                     the source's rate and depth where it was cut or is of a format that only ffmpeg reads
  skipped.jsonl      what was left out, each with its reason
  import_cache.jsonl what has been worked out; deleting it costs time, and texts typed for sounds that are away

Nothing of the source changes. Run it again after a kill, or when recordings came, changed or left: it does only what is
missing, and the result is that of a fresh run. Texts that you typed into rows without text are kept.

Rows that name a part of a file (start or offset, end or duration) get that part. Cues become clips whose edges lie in
silence; short neighbours are joined; cues that overlap, have no words or lie beyond the end are left out. A sound
longer than --longest seconds without text is cut at pauses by a detector of speech. Rows without text are to be typed,
or come from --transcriber COMMAND, which gets a clip's path as its last argument and prints what is said.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools._common import (
    Progress,
    ToolError,
    counted,
    info,
    make_parser,
    run_program,
    warn,
    write_jsonl,
    writing_to,
)
from tools.amharic_text import is_amharic
from tools.clip_files import Cache, Work, run_jobs, stamp_of
from tools.preprocess import ETHIOPIC, say_skipped
from tools.recording_layouts import LAYOUTS, Found, detect, folder_of
from tools.recording_plan import Plan, Source, ids_of, open_source, plan_folder, plan_tables, tables_of
from tools.sound_files import LONGEST_FILE
from tools.sound_names import SOUND_FOLDERS, SoundNames
from trainers.train_gpt_v2 import UserError, available_cores, lock_output_dir

FIRST_COMMAND = "python -m tools.import_recordings processed_data/audio --output-dir build/dataset --speaker demo"
CACHE = "import_cache.jsonl"
SHOWN = 20  # failures of a transcriber that are printed


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def give_ids(rows: Sequence[dict[str, Any]]) -> int:
    """Ids of the source's own column where they are unique, else those of the sounds' names. Returns how many of the
    source's occur twice."""
    wanted = Counter(row["wanted_id"] for row in rows)
    names = {row["id"] for row in rows}
    repeated = 0
    for row in rows:
        own = row.pop("wanted_id")
        if own and wanted[own] == 1 and (own == row["id"] or own not in names):
            row["id"] = own
        elif own and wanted[own] > 1:
            repeated += 1
    return repeated


def speaker_folder(audio: str) -> str:
    """The innermost folder that is no folder of sounds only: a/speaker1/wavs/1.wav -> speaker1."""
    parts = audio.split("/")[:-1]
    return next((part for part in reversed(parts) if part.lower() not in SOUND_FOLDERS), "")


def give_speakers(rows: Sequence[dict[str, Any]], sounds: dict[str, str], args: argparse.Namespace) -> None:
    """`sounds` has the source's path of each row's audio."""
    for row in rows:
        if args.speaker_from == "folder":
            row["speaker"] = speaker_folder(sounds[row["audio"]]) or row["speaker"]
        row["speaker"] = row["speaker"] or args.speaker
        row["language"] = row["language"] or args.language


def finish_row(row: dict[str, Any]) -> dict[str, Any]:
    """In the order of fields that people read; without empty ones that nobody needs."""
    order = ("id", "text", "audio", "speaker", "language", "split", "duration", "source", "start")
    return {key: row[key] for key in order if key in row and (row[key] != "" or key == "text")}


def transcribe(rows: Sequence[dict[str, Any]], work: Work, command: str) -> None:
    """Fills empty texts with what COMMAND prints about the clip. Raises: ToolError when it cannot be started."""
    words = shlex.split(command)
    pending = [row for row in rows if not row["text"]]
    progress, failed = Progress("transcribing", len(pending)), 0
    for done, row in enumerate(pending, 1):
        path = (work.output_dir / row["audio"]).resolve()
        key = ["transcript", words, *stamp_of(path, row["audio"])]
        text = work.cache.get(key)
        if text is None:
            text, fault = transcript_of([*words, str(path)], words[0])
            if fault:
                failed += 1
                if failed <= SHOWN:
                    warn(f"--transcriber on {row['audio']}: {fault}")
            else:
                work.cache.put(key, text)
        row["text"] = text
        progress.update(done)
    if failed:
        warn(f"--transcriber failed on {failed} of {len(pending)} clips; run the same command again to try these again")


def transcript_of(command: Sequence[str], name: str) -> tuple[str, str]:
    """(text, "") or ("", what went wrong). Raises: ToolError when the program is not there."""
    try:
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    except OSError as error:
        raise ToolError(f"--transcriber {name}: cannot be started ({error.strerror}). Give a program and its options, "
                        "to which a clip's path is added") from error
    if result.returncode:
        said = result.stderr.decode(errors="replace").strip().splitlines()
        return "", f"ended with status {result.returncode}{f' ({said[-1]})' if said else ''}"
    try:
        text = " ".join(result.stdout.decode().split())
    except UnicodeDecodeError:
        return "", "printed what is not UTF-8 text"
    return text, "" if text else "printed nothing"


def typed_texts(output_dir: Path, cache: Cache, transcribed: bool) -> dict[str, str]:
    """Texts of rows that this program wrote without one, by their audio; also those whose sound is away now.

    `transcribed`: not those that a transcriber printed, since one is to be asked now.
    Raises: ToolError for a recordings.jsonl that is none.
    """
    typed = {key[1]: value for key, value in cache.of_kind("typed")}
    empty = {key[1] for key, _ in cache.of_kind("empty")}
    printed = {(key[2], value) for key, value in cache.of_kind("transcript")} if transcribed else set()
    path = output_dir / "recordings.jsonl"
    if not path.is_file():
        return typed
    for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            audio, text = row["audio"], " ".join(row["text"].split())
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ToolError(f"{path}, line {number}: is no row with audio and text. Mend it, for texts that you typed "
                            "are kept; or delete the file") from error
        if text and audio in empty and typed.get(audio) != text and (audio, text) not in printed:
            cache.put(["typed", audio], text)
            typed[audio] = text
    return typed


def keep_typed(rows: Sequence[dict[str, Any]], work: Work, transcribed: bool) -> int:
    """Texts that somebody typed go back into rows that have none; such rows are remembered. Returns how many."""
    typed = typed_texts(work.output_dir, work.cache, transcribed)
    kept = 0
    for row in rows:
        if not row["text"]:
            if not work.cache.get(["empty", row["audio"]]):
                work.cache.put(["empty", row["audio"]], 1)
            row["text"] = typed.get(row["audio"], "")
            kept += bool(row["text"])
    return kept


def remove_stale(output_dir: Path, rows: Sequence[dict[str, Any]], cache: Cache) -> int:
    """Deletes the sounds that this program put into audio/ and no row needs any more. Returns how many."""
    needed, count = {row["audio"] for row in rows}, 0
    folders = set()
    for (_, audio), _ in [*cache.of_kind("file")]:
        path = output_dir / audio
        if audio in needed:
            cache.get(["file", audio])
        elif path.is_file():
            path.unlink()
            folders.add(path.parent)
            count += 1
    for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
        with contextlib.suppress(OSError):  # not empty
            while folder != output_dir:
                folder.rmdir()
                folder = folder.parent
    return count


# ---------------------------------------------------------------------------------------------------------------------
# Summary and command line


def say_plan(source: Source, found: Found, names: SoundNames, plan: Plan) -> None:
    info(f"{source.root}: {len(names.sounds)} sounds; {found.layout}: {found.reason}")
    for line in found.left_out:
        info(f"not used: {line}")
    for way, count in names.mended.most_common():
        info(f"{count} names differ by {way}: {names.examples[way]}")
    if source.hidden:
        info(f"{source.hidden} hidden files are left out")
    if source.unnameable:
        warn(f"{source.unnameable} files have names that are no text; they are left out. Rename them")
    strays = sorted(names.sounds - {job.sound for job in plan.jobs}) if found.tables else []
    if strays:
        warn(f"{len(strays)} sounds have no row that can be used: {', '.join(strays[:3])}")


def say_summary(rows: Sequence[dict[str, Any]], skipped: Sequence[dict[str, Any]], work: Work,
                args: argparse.Namespace, folders: int) -> None:
    if skipped:
        warn(f"{len(skipped)} skipped, all of them in {args.output_dir / 'skipped.jsonl'}:")
        for line in say_skipped(skipped):
            warn(f"  {line}")
    foreign = [row["id"] for row in rows
               if row["text"] and is_amharic(row["language"]) and not ETHIOPIC.search(row["text"])]
    if foreign:
        warn(f"{len(foreign)} texts have no Ethiopic letter, such as that of {foreign[0]!r}; preprocess leaves them "
             "out. For another language give --language")
    speakers = {row["speaker"] for row in rows if row["speaker"]}
    nameless = sum(not row["speaker"] for row in rows)
    if nameless:
        hint = f" The sounds lie in {folders} folders: if these are speakers, add --speaker-from folder." \
            if folders > 1 else " Add --speaker NAME if it has one."
        warn(f"{nameless} rows name no speaker: they are taken for one voice.{hint}")
    copied = work.linked["copied"]
    if copied:
        info(f"{copied} sounds were copied, for links to them are not possible")
    seconds, empty = sum(row["duration"] for row in rows), sum(not row["text"] for row in rows)
    info(f"{counted(len(rows), 'recording')} of {counted(len(speakers) + bool(nameless), 'speaker')}, "
         f"{seconds / 3600:.2f} hours"
         + (f", {empty} without text" if empty else ""))
    path = args.output_dir / "recordings.jsonl"
    step = (f"type their texts into {path} and run the same command again, or give --transcriber"
            if empty == len(rows) else f"tools.collect_corpus {path} --output {args.output_dir / 'corpus.txt'}")
    info(f"-> {path}; next: {step}")


def check_arguments(args: argparse.Namespace) -> None:
    """Raises: ToolError naming the flag."""
    if not 0.5 <= args.shortest or not 3 * args.shortest <= args.longest <= LONGEST_FILE:
        raise ToolError(f"--shortest {args.shortest:g} --longest {args.longest:g}: give at least 0.5 s, and at least "
                        f"three times as much but at most {LONGEST_FILE} s")
    if args.jobs < 0:
        raise ToolError(f"--jobs {args.jobs}: give 0 or more")
    try:
        if args.transcriber is not None and not shlex.split(args.transcriber):
            raise ToolError("--transcriber: is empty. Give a program and its options")
    except ValueError as error:
        raise ToolError(f"--transcriber {args.transcriber}: {error}. Close every quotation mark") from error


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, FIRST_COMMAND)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder, table or sound")
    parser.add_argument("--output-dir", type=Path, required=True, help="gets the files named above")
    parser.add_argument("--audio-dir", type=Path, help="holds the sounds, if SOURCE does not")
    parser.add_argument("--layout", choices=list(LAYOUTS), help="what SOURCE is (found out)")
    parser.add_argument("--speaker", default="", help="of rows that name none (none)")
    parser.add_argument("--speaker-from", choices=["column", "folder"], default="column",
                        help="folder: the one that a sound lies in (column, if there is one)")
    parser.add_argument("--language", default="am", help="of rows that name none (am)")
    parser.add_argument("--transcriber", metavar="COMMAND", help="gets a clip's path and prints its text")
    parser.add_argument("--shortest", type=float, default=2, help="seconds of a clip of a long recording (2)")
    parser.add_argument("--longest", type=float, default=15, help="seconds; longer sounds without text are cut (15)")
    parser.add_argument("--jobs", type=int, default=0, help="sounds at a time, 0 = one per core (0)")
    args = parser.parse_args(argv)
    check_arguments(args)
    return args


def make_plan(args: argparse.Namespace) -> Plan:
    """Finds out what the source is and says so. Raises: ToolError."""
    source = open_source(args.source, args.audio_dir, args.output_dir)
    names = SoundNames(source.sounds)
    tables, unreadable = ([], []) if args.layout == "folder" else tables_of(source)
    found = detect(str(args.source), source.listing, tables, names, args.layout or "", bool(source.table), unreadable)
    if unreadable:
        warn(f"{len(unreadable)} files cannot be read as tables: {'; '.join(unreadable[:3])}")
    ids = ids_of(source.sounds)
    is_folder = found.layout == "folder"
    plan = plan_folder(source, ids, args.language) if is_folder else plan_tables(source, found, names, ids)
    say_plan(source, found, names, plan)
    return plan


def import_all(plan: Plan, args: argparse.Namespace) -> None:
    cache = Cache(args.output_dir / CACHE)
    work = Work(plan, cache, args.output_dir, args.shortest, args.longest)
    try:
        rows, skipped = run_jobs(work, args.jobs or available_cores())
        skipped = sorted([*plan.skipped, *skipped], key=lambda row: row["row"])
        if not rows:
            write_jsonl(args.output_dir / "skipped.jsonl", skipped)
            raise ToolError(f"{args.source}: not one recording can be used. {'; '.join(say_skipped(skipped))}")
        repeated = give_ids(rows)
        if repeated:
            warn(f"{repeated} rows have an id that occurs twice; they are named after their sounds")
        sounds = {row["audio"]: row.get("source") or row["audio"].removeprefix("audio/") for row in rows}
        give_speakers(rows, sounds, args)
        kept = keep_typed(rows, work, bool(args.transcriber))
        if args.transcriber:
            transcribe(rows, work, args.transcriber)
        with writing_to(args.output_dir):
            write_jsonl(args.output_dir / "skipped.jsonl", skipped)
            write_jsonl(args.output_dir / "recordings.jsonl", [finish_row(row) for row in rows])
            stale = remove_stale(args.output_dir, rows, cache)
            cache.prune()
    finally:
        cache.close()
    if kept:
        info(f"{kept} typed texts are kept")
    if stale:
        info(f"{stale} sounds that no row needs any more are removed from {args.output_dir / 'audio'}")
    folders = len({folder_of(sound) for sound in sounds.values()})
    say_summary(rows, skipped, work, args, folders)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    plan = make_plan(args)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock_output_dir(args.output_dir))
        except UserError as error:
            raise ToolError(str(error)) from error
        with writing_to(args.output_dir):
            import_all(plan, args)


if __name__ == "__main__":
    run_program(main)
