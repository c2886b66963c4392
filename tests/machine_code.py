"""What a compiled kernel's main loop does, read from Triton's GPU dialect (TTGIR) and from the machine code (SASS)."""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass

PRODUCTS = ("tt.dot ", "ttng.warp_group_dot ", "ttng.tc_gen5_mma ")
MULTIPLIES = ("HGMMA", "HMMA", "UTCHMMA")
FETCHES = "ttng.async_tma_copy_global_to_local"


def main_loops(ttgir: str) -> list[list[str]]:
    """The lines of every loop that holds a matrix product and no other loop."""
    found: list[list[str]] = []
    open_loops: list[tuple[int, list[str]]] = []
    depth, innermost = 0, False
    for line in ttgir.splitlines():
        for _, lines in open_loops:
            lines.append(line)
        if "scf.for" in line or "scf.while" in line:
            open_loops.append((depth, []))
            innermost = True
        depth += line.count("{") - line.count("}")
        while open_loops and depth <= open_loops[-1][0]:
            lines = open_loops.pop()[1]
            if innermost and any(product in one for one in lines for product in PRODUCTS):
                found.append(lines)
            innermost = False
    return found


def copies_ahead(ttgir: str) -> list[list[int]]:
    """Of every main loop, how many copies are in flight whenever it waits for one: groups of them, or the hardware's own."""
    fetches = ttgir.count(FETCHES)
    found = []
    for loop in main_loops(ttgir):
        groups = [int(number) for line in loop for number in re.findall(r"ttg\.async_wait .*num = (\d+)", line)]
        inside = sum(line.count(FETCHES) for line in loop)
        found.append([*groups, *([fetches - inside] if inside else [])])  # the others were started before the loop
    return found


@dataclass(frozen=True)
class Code:
    """Instructions and where each may go next."""

    instructions: list[str]
    successors: list[list[int]]

    @staticmethod
    def of(sass: str) -> Code:
        instructions: list[str] = []
        labels: dict[str, int] = {}
        for line in sass.splitlines():
            if label := re.match(r"^\.(L_x_\d+):", line.strip()):
                labels[label[1]] = len(instructions)
            elif found := re.match(r"^\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
                instructions.append(found[1].strip())
        successors = []
        for place, instruction in enumerate(instructions):
            goes_on = [place + 1] if place + 1 < len(instructions) else []
            predicated = instruction.startswith("@") and not instruction.startswith("@!PT")
            if target := re.search(r"\bBRA(?:\.\S+)?\s.*`\(\.(L_x_\d+)\)", instruction):
                is_certain = not predicated and not re.search(r"\bBRA(?:\.\S+)?\s+!?U?P\d", instruction)
                goes_on = [] if is_certain else goes_on
                goes_on.append(labels[target[1]])
            elif re.match(r"^(EXIT|RET|BRX)", instruction):
                goes_on = []
            successors.append(goes_on)
        return Code(instructions, successors)

    def round_trip(self) -> dict[str, int] | None:
        """The shortest way from a matrix product around its loop back to it: how many instructions, and of what.

        Of several loops, that which multiplies most. None: no loop multiplies.
        """
        best: dict[str, int] | None = None
        for start, instruction in enumerate(self.instructions):
            if not any(name in instruction for name in MULTIPLIES):
                continue
            way = self._way_back(start)
            if way is None:
                continue
            multiplies = sum(any(name in self.instructions[place] for name in MULTIPLIES) for place in way)
            found = {"products": multiplies, "others": len(way) - multiplies}
            if best is None or (found["products"], -found["others"]) > (best["products"], -best["others"]):
                best = found
        return best

    def _way_back(self, start: int) -> list[int] | None:
        came_from = {}
        queue = deque([start])
        while queue:
            place = queue.popleft()
            for after in self.successors[place]:
                if after == start:
                    way = [place]
                    while way[-1] != start:
                        way.append(came_from[way[-1]])
                    return way
                if after not in came_from:
                    came_from[after] = place
                    queue.append(after)
        return None

    def touched_in_flight(self) -> list[str]:
        """Instructions that read or write an accumulator while a warpgroup's product (HGMMA) may still write it."""
        found = set()
        for start, instruction in enumerate(self.instructions):
            product = re.search(r"HGMMA\.64x(\d+)x\d+\S* R(\d+)", instruction)
            if product is None:
                continue
            accumulators = set(range(int(product[2]), int(product[2]) + int(product[1]) // 2))
            seen, places = set(), list(self.successors[start])
            while places:
                place = places.pop()
                if place in seen:
                    continue
                seen.add(place)
                one = self.instructions[place]
                if "WARPGROUP.DEPBAR.LE gsb0, 0x0" in one:
                    continue
                if "HGMMA" not in one and accumulators & _registers(one):
                    found.add(f"{place}: {one}")
                places += self.successors[place]
        return sorted(found)


def _registers(instruction: str) -> set[int]:
    """Those named, and the others of a wide operand that is not an address."""
    registers = {int(number) for number in re.findall(r"\bR(\d+)\b", instruction)}
    wide = re.match(r"(?:@!?U?P\d+ )?(?:LD|ST|RED|ATOM)\w*(?:\.\w+)*?\.(64|128)\b", instruction)
    if wide and (operand := re.search(r"(?:^|[ ,])R(\d+)(?=$|,)", instruction)):
        registers |= set(range(int(operand[1]), int(operand[1]) + int(wide[1]) // 32))
    return registers
