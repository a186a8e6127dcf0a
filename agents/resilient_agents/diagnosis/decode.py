"""Decode: what a number in a line means, by the tables of the catalogue.

Think of a dispatcher with the binder of fault numbers: the entry says "here stands a number of that kind", the binder says what it asks
for, and a few words of the line itself ("Nonfatal", "from ... to None") may overrule the binder.

Contract: each reader gets what the entry's pattern found and the text, and gives the fields of the finding that it knows better than the
entry. A number that no table has is answered with care: somebody should look, nobody loses a node for it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from resilient_agents.diagnosis import catalogue

if TYPE_CHECKING:
    from collections.abc import Callable

NVLINK: Final = frozenset({"74", "108", "136", "137", *map(str, range(144, 151)), "155", "166", "170"})
RECOVERY: Final = {  # Xid 154 names what the driver now asks for
    "none": ("ignore", True),
    "gpu reset": ("gpu-reset", False),
    "drain and reset": ("gpu-reset", False),
    "drain p2p": ("app-restart", False),
    "node reboot": ("replace", False),
}
RECOVERY_CODES: Final = {"0": "none", "1": "gpu reset", "2": "node reboot", "3": "drain p2p", "4": "drain and reset"}
_HEX: Final = re.compile(r"0x[0-9a-fA-F]{1,16}")
_REMOTE: Final = re.compile(
    r"Connect(?:ion|or|Err|Time|Fail)|Disconnect|\wTime(?:out|dOut)|(?:Comm|Stream|Channel|Socket)Closed|Unavailable|Unreachable|Died"
)
_TO: Final = re.compile(r"\bto\s+(?:0x)?(\d{0,3})\s*(?:\(([\w ]{1,40})\))?", re.IGNORECASE)


def xid(found: dict[str, str], text: str) -> dict[str, Any]:
    """By the table; 154 and the NVLink 5 family by their text."""
    number, low = str(int(found["code"])), text.lower()
    row = catalogue.table("xid").get(number)
    known: dict[str, Any] = {"code": number, "layer": "nvlink" if number in NVLINK else "gpu"}
    if number == "154":
        return known | _recovery(text)
    if 144 <= int(number) <= 150:
        return known | _nvlink5(number, text)
    if row is None:
        harmless = "nonfatal" in low or "non-fatal" in low or "informational" in low
        return known | {"class_": "ignore", "role": "context"} if harmless else known | {"class_": "app-restart"}
    if number == "94" and "rst: yes" in low.replace("d-rst: yes", ""):
        return known | {"class_": "gpu-reset"}
    role = "cascade" if row["origin"] == "cascade" else "context" if row["class"] == "ignore" else "cause"
    return known | {"class_": row["class"], "role": role}


def _recovery(text: str) -> dict[str, Any]:
    """Xid 154: from which action to which."""
    tail = text[max(text.lower().find("changed"), 0) :]
    if to := _TO.search(tail):
        word = (to[2] or RECOVERY_CODES.get(to[1], "")).lower()
        for name, (class_, clears) in RECOVERY.items():
            if word.startswith(name):
                return {"class_": class_, "clears": clears, "role": "context" if clears else "symptom"}
    return {"class_": "gpu-reset", "role": "symptom"}


def _nvlink5(number: str, text: str) -> dict[str, Any]:
    """Xid 144 to 150: the severity stands in the text, whose fault it is in the bits of the first word."""
    low = text.lower()
    if "nonfatal" in low or "non-fatal" in low:
        return {"class_": "ignore", "role": "context"}
    rule = nvlink5_rule(number, text)
    if "fatal" not in low and rule is not None and rule["nvidia_resolution"] != "RESET_GPU":
        return {"class_": "ignore", "role": "context"}
    peer = rule is not None and "PEER" in rule["nvidia_investigate"]
    return {"class_": "gpu-reset", "role": "symptom" if peer else "cause"}


def nvlink5_rule(number: str, text: str) -> dict[str, str] | None:
    """The row of the table for intrinfo and error status, the first two hex words; newer drivers' bits before older ones'."""
    words = [int(word, 16) for word in _HEX.findall(text)[:2]]
    if not words:
        return None
    bits = f"{words[0] & 0xFFFFFFFF:032b}"
    for column in ("intrinfo_bits_v2", "intrinfo_bits_v1"):
        for row in catalogue.rows("nvlink5"):
            if row["xid"] == number and all(want in {"-", bit} for want, bit in zip(row[column], bits, strict=False)):
                status = int(row["error_status"], 16)
                if len(words) < 2 or status == words[1] or (status and words[1] & status) or row["unit"].startswith("NETIR_LINK"):
                    return row
    return None


def sxid(found: dict[str, str], text: str) -> dict[str, Any]:
    """By the table; the line's own word on whether it was fatal counts where the table leaves it open."""
    number, low = str(int(found["code"])), text.lower()
    known: dict[str, Any] = {"code": number}
    if re.search(r"\d,? +(?:severity \d|data \{)", low):  # details of the line before, same number
        return known | {"class_": "ignore", "role": "context"}
    mild = "non-fatal" in low or "nonfatal" in low
    fatal = not mild and "fatal" in low
    row = catalogue.table("sxid").get(number)
    class_ = row["class"] if row else "gpu-reset" if fatal else "ignore"
    if row and row["fatal"] == "may be":
        class_ = "ignore" if mild else "gpu-reset" if fatal and class_ == "ignore" else class_
    elif row and row["fatal"] == "no" and fatal and class_ == "ignore":
        class_ = "gpu-reset"
    return known | {"class_": class_, "role": "context" if class_ == "ignore" else "cause"}


def wc(found: dict[str, str], _text: str) -> dict[str, Any]:
    """A verbs completion status, by number or by name."""
    wanted = (found.get("status") or found.get("name") or "").upper().removeprefix("IBV_WC_")
    for row in catalogue.rows("wc"):
        if wanted in {row["status"], row["name"]}:
            class_ = row["class"].partition(";")[0] or "ignore"
            return {"code": f"wc {row['status']}", "class_": class_, "role": row["role"] or "context"}
    return {"code": f"wc {wanted}".strip(), "class_": "app-restart", "role": "symptom"}


def cuda(found: dict[str, str], text: str) -> dict[str, Any]:
    """A CUDA error by its text, its name or its number."""
    low = text.lower()
    best: dict[str, str] | None = None
    for row in catalogue.rows("cuda"):
        name = row["name"].partition(" ")[0]
        hit = (
            any(part.strip() in low for part in row["text"].lower().split(" / "))
            or name.lower() in low
            or row["code"] == found.get("number")
        )
        if hit and (best is None or len(row["text"]) > len(best["text"])):
            best = row
    if best is None:
        return {"code": found.get("number", ""), "class_": "app-restart", "role": "symptom"}
    class_ = best["class"]
    hardware = best["origin"].startswith("hw") and class_ != "app-restart"
    return {"code": best["name"].partition(" ")[0], "class_": class_, "role": "cause" if hardware or class_ == "user" else "symptom"}


def exit_code(found: dict[str, str], text: str) -> dict[str, Any]:
    """How a process ended: Python's negative numbers or the shell's above 128."""
    raw = int(found["status"])
    wanted = str(raw)
    for row in catalogue.rows("exits"):
        if wanted in {row["python_returncode"], row["shell_code"]}:
            class_ = re.split(r"[ ;]", row["class"])[0]
            name = row["name"] if row["name"].startswith("SIG") else f"exit {raw}"
            if class_ == "by":
                class_ = "app-restart"
            return {"code": name, "class_": class_, "role": "cascade" if class_ == "ignore" else "symptom"}
    signal = re.search(r"\bSIG[A-Z0-9]{2,7}\b", text)
    return {"code": signal[0] if signal else f"exit {raw}", "class_": "app-restart" if raw else "ignore", "role": "symptom"}


def signal_name(found: dict[str, str], _text: str) -> dict[str, Any]:
    """How a process ended, by the name of the signal."""
    named = found.get("code", "").upper()
    for row in catalogue.rows("exits"):
        if row["name"] == named:
            class_ = re.split(r"[ ;]", row["class"])[0]
            return {"code": row["name"], "class_": class_, "role": "cascade" if class_ == "ignore" else "symptom"}
    return {"code": named}


def ascend(found: dict[str, str], _text: str) -> dict[str, Any]:
    """An Ascend event or error code."""
    code = found["code"].upper().removeprefix("0X")
    row = catalogue.table("ascend").get(code)
    if row is None:
        return {"code": code}
    return {"code": code, "class_": row["class"], "role": "context" if row["class"] == "ignore" else "cause"}


def oom(_found: dict[str, str], text: str) -> dict[str, Any]:
    """Whose memory was out: a group's, or the whole machine's. The invoker's line does not say."""
    low = text.lower()
    if "memory cgroup out" in low or "constraint_memcg" in low:
        return {"code": "memcg"}
    return {"code": "" if "invoked oom-killer" in low else "global"}


def optype(found: dict[str, str], text: str) -> dict[str, Any]:
    """The collective that timed out, wherever in the line it is named."""
    named = re.search(r"OpType=(\w+)", text)
    return {"code": named[1] if named else found.get("code", "")}


def gloo(_found: dict[str, str], text: str) -> dict[str, Any]:
    """How the connection ended."""
    low = text.lower()
    words = {"reset by peer": "reset", "closed by peer": "closed", "broken pipe": "closed", "refused": "refused"}
    return {"code": next((code for word, code in words.items() if word in low), "")}


def cascade(found: dict[str, str], text: str) -> dict[str, Any]:
    """The signal with which the runtime stopped a healthy process."""
    code = found.get("code", "")
    if code.isdigit():
        code = {"15": "SIGTERM", "2": "SIGINT", "9": "SIGKILL", "1": "SIGHUP"}.get(code, code)
    if code in {"SIGSEGV", "SIGBUS", "SIGABRT"}:  # this one died of itself
        return {"code": code, "kind": "exit", "class_": "app-restart", "role": "symptom"}
    process = re.search(r"process (\d{1,10})", text)
    return {"code": code} | ({"device": f"pid:{process[1]}"} if process else {})


def dataloader(found: dict[str, str], _text: str) -> dict[str, Any]:
    """By which signal the loader's process died."""
    word = found.get("signal", "").strip(". ").lower()
    return {"code": {"killed": "SIGKILL", "aborted": "SIGABRT", "segmentation fault": "SIGSEGV", "terminated": "SIGTERM"}.get(word, "")}


def cudalib(found: dict[str, str], text: str) -> dict[str, Any]:
    """A library's status: what the arguments caused is the user's."""
    status = re.search(r"[A-Z]+_STATUS_(?!SUCCESS)\w+", text)
    code = status[0] if status else found["code"]
    mine = code.endswith(("_ALLOC_FAILED", "_NOT_SUPPORTED", "_BAD_PARAM", "_INVALID_VALUE", "_ARCH_MISMATCH", "_INVALID_SIZE"))
    return {"code": code, "class_": "user" if mine else "app-restart", "role": "cause" if mine else "symptom"}


def srun(found: dict[str, str], text: str) -> dict[str, Any]:
    """How a Slurm task ended."""
    if status := found.get("status"):
        return exit_code({"status": status}, text)
    word = (found.get("why") or "").lower()
    names = {"killed": "SIGKILL", "aborted": "SIGABRT", "segmentation fault": "SIGSEGV", "bus error": "SIGBUS", "out of memory": "SIGKILL"}
    return {"code": names.get(word, "")}


def exception(found: dict[str, str], _text: str = "") -> dict[str, Any]:
    """A Python exception that nobody else knows: the user's, unless its name says that somebody else was not there."""
    code = found["code"]
    if _REMOTE.search(code):
        return {"code": code, "kind": "conn", "class_": "app-restart", "role": "symptom"}
    return {"code": code}


def hccl(found: dict[str, str], _text: str) -> dict[str, Any]:
    """An HCCL code: what the arguments caused is the user's."""
    code = found["code"].upper()
    if code in {"EI0001", "EI0003", "EI0004", "EI0005"}:  # environment variable, parameter, rank table, parameters differ between ranks
        return {"code": code, "class_": "user", "role": "cause"}
    return {"code": code, "role": "cause" if code.startswith("EJ") else "symptom"}


def acl(found: dict[str, str], _text: str) -> dict[str, Any]:
    """An AscendCL return code."""
    code = (found.get("code") or found.get("named") or "").upper()
    row = catalogue.table("ascend").get(code)
    if row is not None:
        return {"code": code, "class_": row["class"]}
    if code.startswith(("107", "105")):  # parameter errors
        return {"code": code, "class_": "user", "role": "cause"}
    return {"code": code}


def musa(_found: dict[str, str], text: str) -> dict[str, Any]:
    """MUSA repeats CUDA's texts."""
    return cuda({}, text)


READERS: Final[dict[str, Callable[[dict[str, str], str], dict[str, Any]]]] = {
    "xid": xid,
    "sxid": sxid,
    "wc": wc,
    "cuda": cuda,
    "exit": exit_code,
    "signal": signal_name,
    "ascend": ascend,
    "oom": oom,
    "optype": optype,
    "gloo": gloo,
    "cascade": cascade,
    "dataloader": dataloader,
    "cudalib": cudalib,
    "srun": srun,
    "exception": exception,
    "hccl": hccl,
    "acl": acl,
    "musa": musa,
}
