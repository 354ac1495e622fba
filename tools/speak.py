"""Speaks texts with espeak-ng: recordings for the demo, in a synthetic voice.

Each text of a JSON-lines file (id, text; optional split) becomes a 16-bit mono WAV without leading and trailing
silence, and a row of recordings.jsonl (id, speaker, text, language, split, audio). Texts take turns among the voices;
with --every-voice each voice speaks every text. Real recordings need no such step: write recordings.jsonl for them.
Stopped or killed, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from tools._common import (
    Progress,
    ToolError,
    atomic_path,
    info,
    make_parser,
    read_jsonl,
    run_program,
    sha256_of,
    text_fault,
    write_jsonl,
    writing_to,
)
from tools.amharic_text import KNOWN_RULES, TEXT_RULES, normalise_for
from tools.sound_files import trim_silence
from tools.text_rules import language_of

FIRST_COMMAND = ("python -m tools.amharic_text build --output-dir build && "
                 "python -m tools.speak --texts build/texts.jsonl --output-dir build/recordings --limit 100")
# espeak-ng pauses at ASCII marks; some Ethiopic ones it reads out as words.
SPOKEN_MARKS = str.maketrans({"፣": ",", "፤": ",", "፥": ",", "።": "."})
FINISHED = ".finished"  # in the output folder until recordings.jsonl is there: made_with of every WAV that was written


def speaker_of(voice: str) -> str:
    """A speaker name that is safe in paths and ids: am+f2 -> am_f2."""
    return re.sub(r"[+/\\]", "_", voice)


def speak(text: str, spoken: str, voice: str, words_per_minute: int, path: Path) -> None:
    """One text to one WAV file. `spoken` is what it says, `text` is for messages. Raises: ToolError when there is no
    sound, OSError when there is no room for it.

    Text goes through standard input, so that nothing in it can be taken for an option; sound comes back through
    standard output, because espeak-ng does not mind a full disk.
    """
    command = ["espeak-ng", "-v", voice, "-s", str(words_per_minute), "-b", "1", "--stdin", "--stdout"]
    result = subprocess.run(command, input=spoken.translate(SPOKEN_MARKS).encode(), capture_output=True)
    if result.returncode:
        reason = result.stderr.decode(errors="replace").strip() or f"it ended with status {result.returncode}"
        raise ToolError(f"espeak-ng cannot speak {text!r} with voice {voice}: {reason}. `espeak-ng --voices=am` "
                        "lists the voices")
    waveform, sample_rate = np.empty(0, dtype=np.int16), 0
    if result.stdout:
        waveform, sample_rate = soundfile.read(io.BytesIO(result.stdout), dtype="int16")
    trimmed = trim_silence(waveform.astype(np.float32), sample_rate).astype(np.int16)
    if not len(trimmed):
        raise ToolError(f"espeak-ng is silent on {text!r}. Remove this text or spell it in Ethiopic letters")
    sound = io.BytesIO()
    soundfile.write(sound, trimmed, sample_rate, format="WAV", subtype="PCM_16")
    with atomic_path(path) as temporary:
        temporary.write_bytes(sound.getvalue())


class RowCheck:
    """For read_jsonl: what is wrong with a row of texts. Its id names a file, so it must be one name and unique."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def __call__(self, row: dict[str, Any]) -> str:
        name = str(row["id"])
        if not isinstance(row["id"], str | int) or not name or name[0] == "." or set(name) & set("/\\\0"):
            return (f"id {row['id']!r} cannot be part of a file name. Take letters and digits, without / and \\ and "
                    "no dot in front")
        if name in self.seen:
            return f"id {name!r} occurs a second time. Give every text its own id"
        self.seen.add(name)
        return text_fault(row)


def plan_recordings(texts: Sequence[dict[str, Any]], voices: Sequence[str], every_voice: bool,
                    rules: int = TEXT_RULES) -> list[dict[str, str]]:
    """Rows of recordings.jsonl plus the voice to speak each with, and what it says by the text `rules`. Without
    `every_voice` the voices take turns."""
    rows = []
    for index, text in enumerate(texts):
        language = language_of(text)
        spoken = normalise_for(language, text["text"], rules)
        for voice in voices if every_voice else [voices[index % len(voices)]]:
            speaker = speaker_of(voice)
            name = f"{text['id']}_{speaker}"
            rows.append({"id": name, "speaker": speaker, "text": text["text"], "language": language,
                         "split": text.get("split", "train"), "audio": f"wavs/{name}.wav", "voice": voice,
                         "spoken": spoken})
    return rows


def made_with(row: dict[str, str], words_per_minute: int, path: Path) -> str:
    """What a recording was made from and which bytes came of it, as one word; "" without a recording."""
    if not path.is_file():
        return ""
    recipe = json.dumps([row["audio"], row["spoken"], row["voice"], words_per_minute])
    return f"{hashlib.sha256(recipe.encode()).hexdigest()}:{sha256_of(path)}"


def speak_all(rows: Sequence[dict[str, str]], folder: Path, words_per_minute: int, workers: int) -> None:
    """Writes the rows' WAV files, but those that a run before has finished already."""
    def speak_row(row: dict[str, str]) -> str:
        path = folder / row["audio"]
        speak(row["text"], row["spoken"], row["voice"], words_per_minute, path)
        return made_with(row, words_per_minute, path)

    folder.mkdir(parents=True, exist_ok=True)
    finished = folder / FINISHED
    known = set(finished.read_text(encoding="utf-8").split()) if finished.exists() else set()
    missing = [row for row in rows
               if not known or made_with(row, words_per_minute, folder / row["audio"]) not in known]
    if len(missing) < len(rows):
        info(f"{len(rows) - len(missing)} of {len(rows)} recordings are there already")
    progress = Progress("speaking", len(missing))
    with finished.open("a", encoding="utf-8") as log, ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(speak_row, row) for row in missing]
        try:
            for done, job in enumerate(jobs, 1):
                print(f"\n{job.result()}", end="", file=log, flush=True)  # a kill may have cut the line before short
                progress.update(done)
        finally:
            pool.shutdown(cancel_futures=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, FIRST_COMMAND)
    parser.add_argument("--texts", type=Path, required=True, help="JSON lines with id and text")
    parser.add_argument("--output-dir", type=Path, required=True, help="gets recordings.jsonl and wavs/")
    parser.add_argument("--voices", nargs="+", default=["am", "am+f2"], help="espeak-ng voices (am am+f2)")
    parser.add_argument("--words-per-minute", type=int, default=175, help="speed of the voices, 80 to 450 (175)")
    parser.add_argument("--every-voice", action=argparse.BooleanOptionalAction, default=False,
                        help="every voice speaks every text (they take turns)")
    parser.add_argument("--limit", type=int, default=0, help="only the first N texts (0 = all)")
    parser.add_argument("--workers", type=int, default=4, help="texts spoken at the same time (4)")
    parser.add_argument("--rules", type=int, choices=KNOWN_RULES, default=TEXT_RULES, help="version of the Amharic "
                        f"text rules; that of the tokenizer or checkpoint that the recordings are for ({TEXT_RULES})")
    args = parser.parse_args(argv)
    for flag, value, least in (("--limit", args.limit, 0), ("--workers", args.workers, 1)):
        if value < least:
            raise ToolError(f"{flag} is {value}; take {least} or more")
    speakers = [speaker_of(voice) for voice in args.voices]
    if args.every_voice and len(set(speakers)) < len(speakers):
        raise ToolError(f"--voices {' '.join(args.voices)}: two of them would write the same files. Name each once")
    if shutil.which("espeak-ng") is None:
        raise ToolError("espeak-ng is not installed. Install it: apt install espeak-ng (brew install espeak-ng)")
    texts = read_jsonl(args.texts, ["id", "text"], "`python -m tools.amharic_text build` writes such a file",
                       RowCheck())
    rows = plan_recordings(texts[: args.limit or None], args.voices, args.every_voice, args.rules)
    with writing_to(args.output_dir):
        speak_all(rows, args.output_dir, args.words_per_minute, args.workers)
        for row in rows:
            del row["voice"], row["spoken"]
        write_jsonl(args.output_dir / "recordings.jsonl", rows)
        (args.output_dir / FINISHED).unlink()
    info(f"{len(rows)} recordings -> {args.output_dir / 'recordings.jsonl'}")


if __name__ == "__main__":
    run_program(main)
