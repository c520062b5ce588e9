"""
Tells what the product needs, and what that needs, at the versions that are installed: `requirements.lock`.
"""

from __future__ import annotations

from importlib.metadata import distribution

from packaging.requirements import Requirement

HEAD = "# What the images are made of, one version each; `make lock` writes it from what is installed."


def needed(name: str = "bfaas") -> dict[str, str]:
    """Find all that a distribution needs, the extras that are asked for included; with versions."""
    versions: dict[str, str] = {}
    asked: set[tuple[str, frozenset[str]]] = set()
    left: list[tuple[str, frozenset[str]]] = [(name, frozenset())]
    while left:
        one = left.pop()
        if one in asked:
            continue
        asked.add(one)
        found = distribution(one[0])
        versions[found.metadata["Name"]] = found.version
        for line in found.requires or []:
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in one[1] | {""}):
                left.append((requirement.name, frozenset(requirement.extras)))
    del versions[name]
    return versions


if __name__ == "__main__":
    print(HEAD)
    for name, version in sorted(needed().items(), key=lambda item: item[0].lower()):
        print(f"{name}=={version}")
