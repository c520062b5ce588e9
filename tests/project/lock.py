"""Print `requirements.lock`: the dependencies of bfaas, and theirs, at the versions that are installed."""

from __future__ import annotations

from importlib.metadata import distribution

from packaging.requirements import Requirement

HEAD = "# The packages of the images. `make lock` writes this file from the installed versions."


def needed(name: str = "bfaas") -> dict[str, str]:
    """Return all dependencies of a distribution, those of requested extras included, with their versions."""
    versions: dict[str, str] = {}
    visited: set[tuple[str, frozenset[str]]] = set()
    pending: list[tuple[str, frozenset[str]]] = [(name, frozenset())]
    while pending:
        node = pending.pop()
        if node in visited:
            continue
        visited.add(node)
        package = distribution(node[0])
        versions[package.metadata["Name"]] = package.version
        for line in package.requires or []:
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in node[1] | {""}):
                pending.append((requirement.name, frozenset(requirement.extras)))
    del versions[name]
    return versions


if __name__ == "__main__":
    print(HEAD)
    for name, version in sorted(needed().items(), key=lambda item: item[0].lower()):
        print(f"{name}=={version}")
