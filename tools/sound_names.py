"""Names of sounds as tables write them, and the sounds that are meant. Pure."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

from tools.recordings import SOUND_SUFFIXES
from tools.sound_decoder import FFMPEG_SUFFIXES, OTHER_SUFFIXES

SOUNDS = SOUND_SUFFIXES | OTHER_SUFFIXES | FFMPEG_SUFFIXES
SOUND_FOLDERS = {"wavs", "wav", "clips", "audio", "audios", "sounds", "recordings", "flac", "mp3", "segments",
                 "audio_files"}


def name_key(name: str) -> str:
    """Equal for names that differ in slashes, case and Unicode form only."""
    return unicodedata.normalize("NFC", name.replace("\\", "/")).casefold()


def without_suffix(name: str) -> str:
    """The name without a sound's ending; other dots stay."""
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and f".{suffix.lower()}" in SOUNDS else name


class SoundNames:
    """Finds the sound that a row names among those of the source."""

    def __init__(self, sounds: Sequence[str]):
        """`sounds` are paths relative to the source, with slashes."""
        self.sounds = set(sounds)
        self.by_name: dict[str, list[str]] = {}
        self.by_stem: dict[str, list[str]] = {}
        for sound in sounds:
            last = name_key(sound).rpartition("/")[2]
            self.by_name.setdefault(last, []).append(sound)
            self.by_stem.setdefault(without_suffix(last), []).append(sound)
        self.mended: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def find(self, name: str, folder: str = "") -> str:
        """The path of the sound that a table in `folder` calls `name`; what it took to find it is counted.

        Raises: LookupError saying why there is none.
        """
        exact = str(PurePosixPath(folder, name)) if folder else name
        if exact in self.sounds:
            return exact
        key = name_key(name.strip())
        last = key.rpartition("/")[2]
        if not last:
            raise LookupError("names no sound")
        found = self.by_name.get(last) or self.by_stem.get(last) or self.by_stem.get(without_suffix(last))
        if not found:
            raise LookupError(f"{name!r} is not there")
        best = self.nearest(found, key, folder)
        if len(best) > 1:
            raise LookupError(f"{name!r} may be {best[0]!r} or {best[1]!r}")
        self.note(name, best[0])
        return best[0]

    def has(self, name: str, folder: str = "") -> bool:
        """Whether `find` would find it."""
        mended, examples = self.mended.copy(), dict(self.examples)
        try:
            return bool(self.find(name, folder))
        except LookupError:
            return False
        finally:
            self.mended, self.examples = mended, examples

    @staticmethod
    def nearest(found: list[str], key: str, folder: str) -> list[str]:
        """Those of `found` that share most folders with the name, from the right; of these, those in the table's
        folder."""
        if len(found) == 1:
            return found
        wanted = [part for part in key.split("/")[:-1] if part not in (".", "")]

        def shared(sound: str) -> int:
            parts = name_key(sound).split("/")[:-1]
            count = 0
            while count < min(len(parts), len(wanted)) and parts[-1 - count] == wanted[-1 - count]:
                count += 1
            return count

        most = max(map(shared, found))
        best = [sound for sound in found if shared(sound) == most]
        endings = [sound for sound in best if name_key(sound).rpartition(".")[2] == key.rpartition(".")[2]]
        near = [sound for sound in endings or best
                if not folder or sound.startswith(f"{folder}/")
                and set(sound[len(folder) + 1:].lower().split("/")[:-1]) <= SOUND_FOLDERS]
        return near if len(near) == 1 else endings or best

    def note(self, name: str, sound: str) -> None:
        """Counts how a name differs from that of its sound."""
        parts, last = PurePosixPath(sound), name.strip().replace("\\", "/").rpartition("/")[2]
        written, there = without_suffix(last), without_suffix(parts.name)
        endings = last[len(written):], parts.name[len(there):]
        ways = ["Windows slashes"] if "\\" in name else []
        if not endings[0]:
            ways.append("no ending")
        elif endings[0].lower() != endings[1].lower():
            ways.append("another ending")
        if written != there and unicodedata.normalize("NFC", written) == unicodedata.normalize("NFC", there):
            ways.append("another Unicode form (NFC, NFD)")
        elif written != there or (endings[0] != endings[1] and endings[0].lower() == endings[1].lower()):
            ways.append("other case")
        folder = name_key(name).rpartition("/")[0].removeprefix("./").strip("/")
        if folder and not f"/{name_key(sound)}".endswith(f"/{folder}/{name_key(parts.name)}"):
            ways.append("another folder")
        for way in ways:
            self.mended[way] += 1
            self.examples.setdefault(way, f"{name!r} is {sound!r}")
