"""What the doctor says of a machine."""

import pytest

from rotexport import doctor
from rotexport.errors import TargetError


def test_gpus_are_read_from_the_drivers_table():
    gpus = doctor.find_gpus(lambda: "NVIDIA RTX 4090, 8.9, 24564\nNVIDIA H200, 9.0, 143771\nbroken line\n")
    assert [(g.capability, g.memory) for g in gpus] == [("sm89", 24564), ("sm90", 143771)]
    assert doctor.find_gpus(lambda: "") == ()


def test_the_text_lists_versions_gpus_and_targets():
    examination = doctor.examine(lambda: "NVIDIA RTX 4090, 8.9, 24564\n")
    text = examination.text
    assert f"onnxruntime        {examination.packages['onnxruntime']}" in text
    assert "NVIDIA RTX 4090, sm89, 24564 MiB" in text
    assert next(line for line in text.splitlines() if line.startswith("target onnx")).endswith("works")


def test_a_missing_package_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    with pytest.raises(TargetError, match=r"tensorrt-rtx is not installed: pip install 'rotexport\[cpu\]'"):
        doctor.require("tensorrt-rtx", ["sm89"])


def test_tensorrt_needs_the_gpu_it_builds_for(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda package: "11.1")
    monkeypatch.setattr(doctor.util, "find_spec", lambda module: object())
    with pytest.raises(TargetError, match="only for a GPU that is present"):
        doctor.require("tensorrt", ["sm89"], lambda: "")
    with pytest.raises(TargetError, match=r"GPU present \(sm90\), not for sm89"):
        doctor.require("tensorrt", ["sm89"], lambda: "NVIDIA H200, 9.0, 143771")
    doctor.require("tensorrt", ["sm90"], lambda: "NVIDIA H200, 9.0, 143771")
    doctor.require("tensorrt-rtx", ["sm89"], lambda: "")


def test_an_untested_version_is_said_so(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda package: "1.0")
    states = {status.target: status for status in doctor.examine(lambda: "").targets}
    assert states["onnx"].works
    assert "tested with onnxruntime 1.31.1 only" in states["onnx"].reason
