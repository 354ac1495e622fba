"""What a browser may bring into the workspace: what tools.import_recordings reads, judged by its content."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from webui.workspace import Refused, Workspace

# tools.sound_names.SOUNDS, the usual ones first; not taken from there, for it loads ffmpeg's libraries.
AUDIO = (".wav", ".flac", ".mp3", ".m4a", ".ogg", ".opus", ".aac", ".amr", ".wma", ".3gp", ".mp4", ".webm", ".aif",
         ".aifc", ".aiff", ".ac3", ".ape", ".asf", ".au", ".avi", ".avr", ".awb", ".caf", ".3g2", ".3gpp", ".8svx",
         ".m4b", ".m4v", ".mka", ".mkv", ".mov", ".mp2", ".mpeg", ".mpg", ".nist", ".oga", ".pvf", ".rf64", ".snd",
         ".sph", ".spx", ".tta", ".voc", ".w64", ".weba", ".wmv", ".wv")
SHEETS = (".xlsx", ".xlsm")
# Tables, texts and subtitles.
TRANSCRIPTS = (".csv", ".tsv", ".txt", ".list", ".lst", ".psv", ".json", ".jsonl", ".ndjson", ".manifest", *SHEETS,
               ".lab", ".trn", ".srt", ".vtt")
JUDGED = 4096  # bytes
# How sounds begin: AU, AIFF and 8SVX, CAF, W64, NIST, VOC, AVR, PVF, FLAC, Ogg, MP3 with a title; Matroska and WebM,
# WMA, AMR, AC-3, MPEG streams, APE, WavPack, TTA.
BEGINNINGS = (b".snd", b"dns.", b"FORM", b"caff", b"riff", b"NIST_1A", b"Creative Voice File", b"2BIT", b"PVF", b"fLaC",
              b"OggS", b"ID3", b"\x1aE\xdf\xa3", b"0&\xb2u\x8ef\xcf\x11", b"#!AMR", b"\x0bw", b"\0\0\1\xba",
              b"\0\0\1\xb3", b"MAC ", b"wvpk", b"TTA1")
MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
RIFF_KINDS = (b"WAVE", b"AVI ")


def is_sound(start: bytes) -> bool:
    """Whether a file that begins so is a sound, or a film, of a kind that can be imported. Pure."""
    riff = start[:4] in (b"RIFF", b"RF64") and start[8:12] in RIFF_KINDS
    mpeg_frame = start[:1] == b"\xff" and start[1:2] >= b"\xe0"  # MP3, MP2 and AAC
    return riff or mpeg_frame or start[4:8] in MP4_BOXES or start.startswith(BEGINNINGS)


def is_transcript(start: bytes, suffix: str) -> bool:
    """Whether a file that begins so is a text, or a workbook where the ending says so. Pure."""
    if suffix in SHEETS:
        return start.startswith(b"PK\3\4")
    utf_16 = start.startswith((b"\xff\xfe", b"\xfe\xff"))
    return utf_16 or not any(byte < 32 and byte not in b"\t\n\r\f\x1a" for byte in start)


def check_upload(uploaded: Path, suffixes: Collection[str], megabytes: int) -> None:
    """Raises: Refused."""
    suffix = uploaded.suffix.lower()
    if suffix not in suffixes:
        raise Refused("upload_type", path=uploaded.name, suffixes=" ".join(suffixes))
    if uploaded.stat().st_size > megabytes * 1_000_000:
        raise Refused("upload_too_large", path=uploaded.name, megabytes=megabytes)
    with uploaded.open("rb") as source:
        start = source.read(JUDGED)
    if suffix in TRANSCRIPTS and not is_transcript(start, suffix):
        raise Refused("upload_not_text", path=uploaded.name)
    if suffix not in TRANSCRIPTS and not is_sound(start):
        raise Refused("upload_not_sound", path=uploaded.name)


def take_upload(workspace: Workspace, uploaded: Path, folder: str, suffixes: Collection[str], megabytes: int) -> Path:
    """Copies an uploaded file into a folder of the workspace, under its own last name. Raises: Refused."""
    check_upload(uploaded, suffixes, megabytes)
    target = workspace.inside(f"{workspace.inside(folder)}/{uploaded.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle = target.open("xb")  # never over a file that is there
    except FileExistsError as error:
        raise Refused("file_in_the_way", path=workspace.show(target)) from error
    except OSError as error:
        raise Refused("not_writable", path=workspace.show(target)) from error
    try:
        with handle, uploaded.open("rb") as source:
            shutil.copyfileobj(source, handle)
    except OSError as error:
        target.unlink(missing_ok=True)
        raise Refused("not_writable", path=workspace.show(target)) from error
    return target
