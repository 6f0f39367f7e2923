"""bench/sass_flow.py: what it finds in listings that are wrong, and nothing in right ones."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from paths import REPOSITORY

ROOT = REPOSITORY
sys.path.insert(0, str(ROOT / "bench"))

import sass_flow

RECORDED = Path(__file__).parent / "sass" / "cp_async_with_an_l2_policy.sass"


def assembled(text):
    """(address, instruction) pairs of lines `INSTRUCTION` and `label:`; a label stands for its
    address in the instructions."""
    lines = [line.strip() for line in text.strip().splitlines()]
    labels, instructions = {}, []
    for line in lines:
        if line.endswith(":"):
            labels[line[:-1]] = hex(16 * len(instructions))
        else:
            instructions.append(line)
    return [
        (16 * i, re.sub(r"\b[a-z]+\b", lambda m: labels.get(m[0], m[0]), line))
        for i, line in enumerate(instructions)
    ]


def problems(text):
    """{instruction: problem}."""
    return {f.instruction: f.problem for f in sass_flow.check_function("f", assembled(text))}


def test_the_recorded_miscompilation_is_seen():
    """What ptxas 13.0.88 made of cp.async with an L2 policy: the copies of W, and only those."""
    listing = RECORDED.read_text()
    findings = sass_flow.check_listing(listing)
    assert [f.address for f in findings] == [0x600, 0x630, 0x850, 0x870, 0xA00, 0xA70]
    for finding in findings:
        assert "+UR0" in finding.instruction and "desc[UR1]" in finding.instruction
        assert finding.problem == "reads UR0, UR1, UR2, which no path wrote"
        assert finding.function.startswith("_ZN9qlora_ext15gemm_4bit_fused")
    mended = re.sub(r"\+UR0(.*)desc\[UR1\]", r"\1desc[UR16]", listing)
    assert mended != listing and sass_flow.check_listing(mended) == []


def test_the_program_fails_on_the_recorded_miscompilation(tmp_path):
    program = [sys.executable, ROOT / "bench" / "sass_flow.py"]
    result = subprocess.run([*program, RECORDED], capture_output=True, text=True)
    assert result.returncode == 1
    assert f"{RECORDED.name} sm_90a: 1 functions, 6 findings" in result.stdout
    assert "/*0600*/ @!P4 LDGSTS" in result.stdout
    empty = tmp_path / "empty.sass"
    empty.write_text("")
    result = subprocess.run([*program, empty], capture_output=True, text=True)
    assert result.returncode == 1 and "has no device code" in result.stderr


# Each with what must be found: {the start of an instruction: its registers}.
WRONG = {
    "a descriptor": ("LDG.E R4, desc[UR4][R2.64]\nEXIT", {"LDG": "R2, R3, UR4, UR5"}),
    "half of a descriptor": (
        "MOV R2, 0x10\nMOV R3, RZ\nULDC UR4, c[0x0][0x208]\nLDG.E R4, desc[UR4][R2.64]\nEXIT",
        {"LDG": "UR5"},
    ),
    "half of an address": (
        "ULDC.64 UR4, c[0x0][0x208]\nMOV R2, 0x10\nSTG.E desc[UR4][R2.64], R9\nEXIT",
        {"STG": "R3"},
    ),
    "half of an address without its width": (  # as 7.5 prints it
        "MOV R2, 0x10\nLDG.E.SYS R4, [R2+0x8]\nEXIT",
        {"LDG": "R3"},
    ),
    "a shared address": ("LDS.128 R4, [R9+0x10]\nEXIT", {"LDS": "R9"}),
    "an index into constants": ("LDC R4, c[0x0][R9+0x160]\nEXIT", {"LDC": "R9"}),
    "the uniform part of an address": (
        "S2R R2, SR_TID.X\nSTS [R2.X4+UR7+0x20], R9\nEXIT",
        {"STS": "UR7"},
    ),
    "an operand": ("IMAD R4, R5, UR6, R7\nEXIT", {"IMAD": "UR6"}),
    "a wide addend": (
        "UMOV UR4, 0x1\nUMOV UR8, 0x1\nUIMAD.WIDE.U32 UR6, UR4, UR4, UR8\nEXIT",
        {"UIMAD": "UR9"},
    ),
    "a vector that becomes uniform": ("R2UR UR4, R5\nEXIT", {"R2UR": "R5"}),
    "a guard": ("@P2 MOV R4, 0x1\nEXIT", {"@P2 MOV": "P2"}),
    "a guard that is negated": ("@!UP1 UMOV UR4, 0x1\nEXIT", {"@!UP1": "UP1"}),
    "a branch's guard": ("@P0 BRA end\nNOP\nend:\nEXIT", {"@P0 BRA": "P0"}),
    "a uniform branch": ("BRA.U UP0, end\nNOP\nend:\nEXIT", {"BRA.U": "UP0"}),
    "a carry": (
        "IADD3 R2, P0, R2, 0x1, RZ\nIADD3.X R3, RZ, R3, RZ, P1, !PT\nEXIT",
        {"IADD3.X": "P1"},
    ),
    "a predicate that is combined": (
        "ISETP.GE.AND P0, PT, R2, 0x1, P3\nSEL R2, R3, R4, !P4\nEXIT",
        {"ISETP": "P3", "SEL": "P4"},
    ),
    "a predicate of the second kind": (
        "PLOP3.LUT P0, PT, PT, PT, UP2, 0x80, 0x0\nEXIT",
        {"PLOP3": "UP2"},
    ),
    "only the predicates of a mask": (
        "R2P PR, R8, 0x3\n@P0 MOV R2, R3\n@P1 MOV R2, R3\n@P2 MOV R2, R3\nEXIT",
        {"@P2": "P2"},
    ),
    "a copy's zero fill": (
        "ULDC.64 UR4, c[0x0][0x208]\nCS2R R2, SRZ\n"
        "LDGSTS.E.BYPASS.128.ZFILL [RZ], desc[UR4][R2.64], P5\nEXIT",
        {"LDGSTS": "P5"},
    ),
    "written later on the only path": (
        "MOV R2, 0x10\nLDS R4, [R2+UR4]\nUMOV UR4, 0x0\nEXIT",
        {"LDS": "UR4"},
    ),
    "written on a path that does not come here": (
        "S2R R2, SR_TID.X\nISETP.GE.AND P0, PT, R2, 0x1, PT\n@P0 BRA other\n"
        "LDS R4, [R2+UR4]\nEXIT\nother:\nUMOV UR4, 0x0\nSTS [R2+UR4], R4\nEXIT",
        {"LDS": "UR4"},
    ),
    "written after an exit": (
        "BRA use\nUMOV UR4, 0x0\nuse:\nLDS R4, [UR4]\nEXIT",
        {"UMOV": None, "LDS": "UR4"},
    ),
    "in a callee": (
        "MOV R4, back\nMOV R5, RZ\nCALL.REL.NOINC callee\nback:\nEXIT\n"
        "callee:\nLDS R8, [R9]\n@P3 MOV R8, 0x1\nRET.REL.NODEC R4 0x0",
        {"LDS": "R9", "@P3": "P3"},
    ),
    "what no callee writes": (
        "MOV R4, back\nMOV R5, RZ\nCALL.REL.NOINC callee\nback:\nLDS R8, [R9+UR6]\nEXIT\n"
        "callee:\nUMOV UR5, 0x0\nMOV R9, 0x0\nRET.REL.NODEC R4 0x0",
        {"LDS": "UR6"},
    ),
    "uniform after a call elsewhere": (
        "MOV R2, 0x0\nMOV R3, 0x0\nCALL.ABS.NOINC R2\nLDS R8, [R30+UR6]\nEXIT",
        {"LDS": "UR6"},
    ),
    "a function's address": ("CALL.ABS.NOINC R2\nEXIT", {"CALL": "R2, R3"}),
    "where to jump": ("MOV R2, 0x0\nBRX R2 -0x10\nEXIT", {"BRX": "R3"}),
    "one quad of two": (
        "ULDC.64 UR4, c[0x0][0x208]\nCS2R R2, SRZ\nLDG.E.ENL2.256 R8, R12, desc[UR4][R2.64]\n"
        "LDS R20, [R15]\nLDS R21, [R16]\nEXIT",
        {"LDS R21": "R16"},
    ),
    "beside a fragment": (
        "LDSM.16.M88.2 R4, [RZ]\nHMMA.16816.F32.BF16 R8, R20, R4, RZ\n"
        "HMMA.16816.F16 R12, R20, R4, RZ\n"
        "LDS R20, [R5]\nLDS R21, [R11]\nLDS R22, [R13]\nLDS R23, [R6]\nLDS R24, [R14]\nEXIT",
        {"LDS R23": "R6", "LDS R24": "R14"},
    ),
    "beside an accumulator of a warpgroup": (
        "ULDC.128 UR4, c[0x0][0x210]\nHGMMA.64x16x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT\n"
        "LDS R2, [R31]\nLDS R3, [R32]\nEXIT",
        {"LDS R3": "R32"},
    ),
    "a descriptor of B": (  # A in registers: B's descriptor is the second pair
        "UMOV UR6, 0x0\nHGMMA.64x8x16.F32.BF16 R24, R152, gdesc[UR4], R24\nEXIT",
        {"HGMMA": "UR7"},
    ),
    "a PRMT of another register": ("UPRMT UR4, UR5, 0x5410, UR4\nEXIT", {"UPRMT": "UR5"}),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_nothing_wrote_is_found(case):
    text, want = WRONG[case]
    found = problems(text)
    assert len(found) == len(want), found
    for start, registers in want.items():
        (problem,) = [p for i, p in found.items() if i.startswith(start)]
        if registers is None:
            assert problem == "no path from the entry reaches it"
        else:
            assert problem == f"reads {registers}, which no path wrote"


RIGHT = {
    "written under a predicate": (
        "S2R R2, SR_TID.X\nISETP.GE.AND P0, PT, R2, 0x1, PT\n@P0 UMOV UR4, 0x1\n"
        "@!P0 ISETP.NE.AND P1, PT, R2, 0x3, PT\n@P1 LDS R4, [R2+UR4]\nEXIT"
    ),
    "written on one of two paths": (
        "S2R R2, SR_TID.X\nISETP.GE.AND P0, PT, R2, 0x1, PT\n@P0 BRA over\nUMOV UR4, 0x1\n"
        "over:\nLDS R4, [R2+UR4]\nEXIT"
    ),
    "written in the turn before": (
        "S2R R2, SR_TID.X\nPLOP3.LUT P0, PT, PT, PT, PT, 0x80, 0x0\nhead:\n@!P0 LDS R4, [R3]\n"
        "MOV R3, 0x10\nPLOP3.LUT P0, PT, PT, PT, PT, 0x8, 0x0\nISETP.GE.AND P1, PT, R2, 0x9, PT\n"
        "@P1 BRA head\nEXIT"
    ),
    "read into its own register": (
        "ULOP3.LUT UR4, UR4, 0xffff, URZ, 0xc0, !UPT\nUPRMT UR5, UR4, 0x5410, UR5\n"
        "LOP3.LUT R2, R2, 0xff, RZ, 0xc0, !PT\nPRMT R3, R2, 0x7610, R3\nLDS R4, [R3+UR5]\nEXIT"
    ),
    "vectors in arithmetic": (
        "FADD R4, R5, R6\nHMMA.16816.F32 R8, R12, R14, R8\nSTS [RZ], R20\nEXIT"
    ),
    "a callee with its caller's state": (
        "UMOV UR4, 0x1\nMOV R8, 0x10\nMOV R4, back\nMOV R5, RZ\nCALL.REL.NOINC callee\n"
        "back:\nLDS R2, [R9+UR5]\nEXIT\n"
        "callee:\nLDS R9, [R8+UR4]\nUMOV UR5, 0x0\nRET.REL.NODEC R4 0x0"
    ),
    "a callee's callee": (
        "MOV R4, back\nMOV R5, RZ\nCALL.REL.NOINC outer\nback:\nLDS R2, [R9]\nEXIT\n"
        "outer:\nMOV R6, inside\nMOV R7, RZ\nCALL.REL.NOINC inner\ninside:\n"
        "RET.REL.NODEC R4 0x0\ninner:\nMOV R9, 0x0\nRET.REL.NODEC R6 0x0"
    ),
    "what vprintf returns": "CS2R R2, SRZ\nLEPC R20, 0x30\nCALL.ABS.NOINC R2\nLDS R8, [R4]\nEXIT",
    "an indirect branch": (
        "UMOV UR4, 0x0\nCS2R R2, SRZ\nBRX R2 -0x20\nLDS R4, [UR4]\nEXIT\nLDS R5, [UR4]\nEXIT"
    ),
    "lanes apart": (
        "BRA.DIV other\nUMOV UR4, 0x0\nback:\nEXIT\nother:\nMOV R15, 0x1\n"
        "WARPSYNC.COLLECTIVE R15, over\nSHFL.BFLY P6, R14, R13, R12, R11\nover:\n"
        "ENDCOLLECTIVE\n@P6 MOV R2, R14\nBRA back"
    ),
    "the end of a region": (
        "ISETP.GE.AND P0, PT, RZ, 0x1, PT\nBSSY B0, join\n@P0 BRA join\nUMOV UR4, 0x1\n"
        "BSYNC B0\njoin:\nLDS R4, [UR4]\nEXIT"
    ),
    "a branch that is never taken": "@!PT BRA far\nUMOV UR4, 0x0\nfar:\nLDS R4, [UR4]\nEXIT",
    "a kernel's padding": "EXIT\nself:\nBRA self\nNOP\nNOP",
    "what a function that is called was given": "LDS R8, [R4]\nRET.ABS.NODEC R20 0x0",
    "eight and sixteen bytes": (
        "LDS.128 R4, [RZ]\nLDC.64 R8, c[0x0][0x160]\nLDCU.128 UR4, c[0x0][0x160]\n"
        "LDS R12, [R7]\nLDS R13, [R9+UR7]\nDADD R14, R14, R14\nLDS R16, [R15]\n"
        "IMAD.WIDE R18, R4, 0x4, R8\nLDS R20, [R19]\nF2I.S64.F64.TRUNC R22, R14\nLDS R24, [R23]\n"
        "MOV.64 R26, R22\nLDS R28, [R27]\nUIADD3.64 UR8, UPT, UPT, UR4, 0x1, URZ\nLDS R29, [UR9]\n"
        "EXIT"
    ),
    "what a vote, an election and a lock say": (
        "VOTE.ANY R2, P0, PT\n@P0 NOP\nVOTEU.ANY UR6, UPT, PT\nLDS R3, [R2+UR6]\n"
        "ELECT P1, URZ, PT\n@P1 NOP\nUSETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8\n@UP0 UMOV UR4, UR6\n"
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR6+0x8], R2\n@P2 NOP\n"
        "IMNMX.S64 P3, P4, R4, R2, R2, PT, !PT\n@P3 NOP\n@!P4 LDS R6, [R5]\nEXIT"
    ),
}


@pytest.mark.parametrize("case", RIGHT)
def test_what_a_path_wrote_is_not_found(case):
    assert problems(RIGHT[case]) == {}


@pytest.mark.parametrize(
    "instruction, says",
    [
        ("QMMA.16832.F32.E4M3.E4M3 R4, R8, R12, R4", "QMMA is not in OPCODES"),
        ("HMMA.884.F32.F32 R4, R8, R12, R4", "HMMA.884.F32.F32: OPCODES does not say how wide"),
        ("IMMA.1.S8.S8 R4, R8, R12, R4", "IMMA.1.S8.S8: OPCODES does not say how wide"),
        ("@P0 UNHEARD R4", "UNHEARD is not in OPCODES"),
    ],
)
def test_an_instruction_that_is_not_known_fails_by_name(instruction, says):
    (problem,) = problems(f"EXIT\n{instruction}").values()
    assert problem.startswith(says)


def test_a_branch_to_nowhere_is_found():
    assert problems("BRA 0x7770\nEXIT") == {
        "BRA 0x7770": "a branch to an address without an instruction"
    }


def test_a_listing_without_code_is_found():
    (finding,) = sass_flow.check_listing("\t\tFunction : empty\n")
    assert str(finding) == "empty /*0000*/ : no code"
