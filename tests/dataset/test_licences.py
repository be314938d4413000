"""Licences by one name each, and a gate that refuses what it does not know."""

from pathlib import Path

import pytest

from soundstage.core.errors import ConfigError
from soundstage.data.flow import Drop, Item
from soundstage.data.licences import FREE, Allowed, licence_name

NAMES = {
    "CC BY 4.0": "CC-BY-4.0",
    "cc-by-4.0": "CC-BY-4.0",
    "CC_BY_SA_3.0": "CC-BY-SA-3.0",
    "CC-BY": "CC-BY",
    "CC BY-NC-ND 4.0 International": "CC-BY-NC-ND-4.0",
    "https://creativecommons.org/licenses/by/4.0/": "CC-BY-4.0",
    "http://creativecommons.org/licenses/by-nc-sa/3.0/us/deed.en": "CC-BY-NC-SA-3.0-US",
    "https://creativecommons.org/licenses/by/4.0/deed.de": "CC-BY-4.0",
    "Creative Commons Attribution license (reuse allowed)": "CC-BY",
    "Creative Commons Attribution-NonCommercial 4.0 International": "CC-BY-NC-4.0",
    "Attribution-NonCommercial-ShareAlike": "CC-BY-NC-SA",
    "Creative Commons Attribution Share Alike 3.0": "CC-BY-SA-3.0",
    "Creative Commons Attribution-NoDerivs 2.0": "CC-BY-ND-2.0",
    "CC0": "CC0-1.0",
    "cc0-1.0": "CC0-1.0",
    "Creative Commons 0": "CC0-1.0",
    "https://creativecommons.org/publicdomain/zero/1.0/": "CC0-1.0",
    "https://creativecommons.org/publicdomain/mark/1.0/": "CC-PDM-1.0",
    "Public Domain Mark 1.0": "CC-PDM-1.0",
    "public domain": "LicenseRef-public-domain",
    "PD-USGov": "LicenseRef-public-domain",
    "Standard YouTube License": "LicenseRef-YouTube-standard",
    "Pexels License": "LicenseRef-Pexels",
    "own work": "LicenseRef-own",
    "All Rights Reserved.": "LicenseRef-all-rights-reserved",
    "apache-2.0": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "MIT License": "MIT",
    "LicenseRef-contract-17": "LicenseRef-contract-17",
    "": None,
    "free": None,
    "see website": None,
    "creative commons": None,
    "CC NC": None,
    "by": None,
    "This film is not in the public domain": None,
    "CC BY 4.0 or CC BY-NC 4.0": None,
    "CC BY 4.0 / CC BY-NC 4.0": None,
    "https://creativecommons.org/licenses/by/4.0/ https://creativecommons.org/licenses/by-nc/4.0/": None,
    "Everything on this page is CC0 " + "and so on " * 20: None,
    "CC BY 4.0 International Public License": "CC-BY-4.0",
}


@pytest.mark.parametrize("told", NAMES)
def test_names(told: str) -> None:
    assert licence_name(told) == NAMES[told]
    assert licence_name(NAMES[told]) == NAMES[told]


def outcome(stage: Allowed, told: str | None) -> Item | Drop:
    (found,) = stage(Item({}, {} if told is None else {"licence": told}), Path())
    return found


def test_the_list_is_a_list_of_what_is_allowed() -> None:
    stage = Allowed()
    passed = [each for each in NAMES if isinstance(outcome(stage, each), Item)]
    assert {NAMES[each] for each in passed} == {
        *("CC-BY", "CC-BY-4.0", "CC0-1.0", "CC-PDM-1.0", "LicenseRef-public-domain", "LicenseRef-own")
    }
    for told in (None, "free", "CC-BY-NC-4.0"):
        dropped = outcome(stage, told)
        assert isinstance(dropped, Drop) and dropped.reason == "licence"


def test_what_was_told_is_kept_beside_the_name() -> None:
    item = outcome(Allowed(), "CC BY 4.0")
    assert isinstance(item, Item)
    assert item.facts == {"licence": "CC-BY-4.0", "licence_told": "CC BY 4.0"}
    again = next(iter(Allowed()(item, Path())))
    assert again == item


def test_a_list_of_ones_own() -> None:
    strict = Allowed(("CC-BY-4.0", "LicenseRef-contract-17"))
    assert isinstance(outcome(strict, "CC BY 4.0"), Item)
    assert isinstance(outcome(strict, "CC BY 3.0"), Drop)
    assert isinstance(outcome(strict, "LicenseRef-contract-17"), Item)
    assert isinstance(outcome(Allowed((*FREE, "CC-BY-SA"), unknown=True), None), Item)
    with pytest.raises(ConfigError, match=r"'CC BY 4\.0' is not a licence's name; write 'CC-BY-4\.0'"):
        Allowed(("CC BY 4.0",))
    with pytest.raises(ConfigError, match="LicenseRef-NAME"):
        Allowed(("free",))
