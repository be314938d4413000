"""Licences by one name each, as SPDX writes them, and the gate that lets through only those that were allowed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from soundstage.core.errors import ConfigError
from soundstage.data.flow import Drop, Item

__all__ = ["FREE", "Allowed", "licence_name"]

# Free to train on and to share with no more than a credit. Share-alike, non-commercial and no-derivatives licences, and
# those of stock sites, depend on what is done with the result: who may use them adds them.
FREE = ("CC0", "CC-PDM", "LicenseRef-public-domain", "CC-BY", "LicenseRef-own")

LONGEST = 120  # characters; a longer text is terms to be read, not a name
NAMES = """Apache-2.0 MIT BSD-2-Clause BSD-3-Clause Unlicense 0BSD WTFPL Zlib ISC MPL-2.0 GPL-2.0 GPL-3.0 LGPL-3.0
AGPL-3.0 ODbL-1.0 ODC-By-1.0 PDDL-1.0 GFDL-1.3 LAL-1.3 OGL-UK-3.0 Etalab-2.0 CDLA-Permissive-2.0"""
SPDX = {name.lower(): name for name in NAMES.split()}
# A text with one of these may say the opposite of the phrase in it; what is not plain is not known.
DOUBT = re.compile(r"\b(not|no longer|except|unless|or|and/or|mixed|various|unknown)\b")
# Phrases as sites write them; a phrase is looked for in the whole text.
PHRASES = (
    (r"standard youtube licen[sc]e", "LicenseRef-YouTube-standard"),
    (r"all rights reserved|^copyright(ed)?$|^proprietary$", "LicenseRef-all-rights-reserved"),
    (r"\bown( work| footage)?$|^self$|^my own$", "LicenseRef-own"),
    (r"\bpexels\b", "LicenseRef-Pexels"),
    (r"\bpixabay\b", "LicenseRef-Pixabay"),
    (r"\bunsplash\b", "LicenseRef-Unsplash"),
    (r"\bmixkit\b", "LicenseRef-Mixkit"),
    (r"\bcoverr\b", "LicenseRef-Coverr"),
    (r"^cc[ -]?pdm\b|\bpublic domain mark\b|publicdomain/mark", "CC-PDM-1.0"),
    (r"\bcc[ -]?0\b|\bcc[ -]zero\b|creativecommons zero|creative commons (zero|0)|publicdomain/zero", "CC0-1.0"),
    (r"\bpublic[ -]?domain\b|^pd$|^pd-", "LicenseRef-public-domain"),
    (r"^apache( licen[sc]e)?,?( v(ersion)?)? ?2(\.0)?$", "Apache-2.0"),
    (r"^(the )?mit licen[sc]e$", "MIT"),
)
WORDS = {
    "noncommercial": "NC",
    "non-commercial": "NC",
    "noderivatives": "ND",
    "noderivs": "ND",
    "no-derivatives": "ND",
    "no derivatives": "ND",
    "no derivs": "ND",
    "sharealike": "SA",
    "share-alike": "SA",
    "share alike": "SA",
    "attribution": "BY",
}


def licence_name(text: str | None) -> str | None:
    """The SPDX name of a licence told as a name, a phrase or a URL; None where it is not known.

    Creative Commons without a version keeps none ("CC-BY"); ports keep their country ("CC-BY-3.0-US"). What SPDX does
    not list is a "LicenseRef-..." name, and one written so is taken as it is.
    """
    told = " ".join((text or "").split()).strip(" .;")
    if not told:
        return None
    if re.fullmatch(r"LicenseRef-[A-Za-z0-9.-]+", told):
        return told
    low = told.lower()
    if low in SPDX:
        return SPDX[low]
    if DOUBT.search(low) or len(low) > LONGEST:
        return None
    for pattern, name in PHRASES:
        if re.search(pattern, low):
            return name
    return _creative_commons(low)


@dataclass(frozen=True)
class Allowed:
    """Lets through items whose licence is on the list; drops the others as "licence", those of unknown licence too.

    licences: names as SPDX has them; one without a version ("CC-BY") allows every version. unknown: whether an item of
    unknown licence may pass, for material that the user has the right to use and that nothing else speaks of.
    The item that passes has the name in its facts under "licence", and what was told under "licence_told".
    """

    licences: tuple[str, ...] = FREE
    unknown: bool = False
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for name in self.licences:
            if licence_name(name) != name and f"{name}-1.0" != licence_name(name):
                near = licence_name(name)
                hint = f"; write {near!r}" if near else '; write its SPDX name, or "LicenseRef-NAME"'
                raise ConfigError(f"Allowed.licences: {name!r} is not a licence's name{hint}")

    def __call__(self, item: Item, folder: Path) -> Iterable[Item | Drop]:  # noqa: ARG002
        """The item with its licence by name, or a Drop("licence")."""
        told = item.facts.get("licence")
        name = licence_name(told)
        facts: dict[str, Any] = {"licence": name}
        if told and told != name and "licence_told" not in item.facts:
            facts["licence_told"] = told
        named = item.child(**facts)
        yield named if self.allows(name) else Drop(named, "licence")

    def allows(self, name: str | None) -> bool:
        """Whether a licence, by its name, is on the list."""
        if name is None:
            return self.unknown
        return any(name == each or re.fullmatch(re.escape(each) + r"-\d.*", name) for each in self.licences)


def _creative_commons(low: str) -> str | None:
    """A licence of the Creative Commons by its URL, its letters or its words."""
    if low.count("creativecommons.org/") > 1:
        return None
    url = re.search(r"creativecommons\.org/licenses/([a-z-]+)/(\d\.\d)(?:/([a-z]{2})\b)?", low)
    letters = re.fullmatch(
        r"(?:cc|creative commons)[ :_-]*(by(?:[ _-]?(?:nc|nd|sa))*)[ _-]*v?(\d\.\d)?(?:[ _-](int|[a-z]{2}))?"
        r"(?:[ ,_-]*(?:international|unported|generic|deed|(?:public )?licen[sc]e))*",
        low,
    )
    match = url or letters
    if match:
        parts, version, port = set(re.findall(r"by|nc|nd|sa", match[1])), match[2], match[3]
        port = port if url or port not in ("int", "in") else None
    elif "creative commons" in low or low.startswith(("attribution", "cc ", "cc-")):
        parts = {letters.lower() for word, letters in WORDS.items() if word in low}
        told = re.search(r"\b(\d\.\d)\b", low)
        version, port = told and told[1], None
    else:
        return None
    if "by" not in parts:
        return None
    name = "-".join(["CC", *(each.upper() for each in ("by", "nc", "nd", "sa") if each in parts)])
    # SPDX writes BY-NC-SA and BY-NC-ND, and no licence has both of the last
    if {"nd", "sa"} <= parts:
        return None
    return "-".join([name, *([version] if version else []), *([port.upper()] if version and port else [])])
