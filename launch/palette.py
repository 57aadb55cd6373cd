"""The report's colours: one for each meaning, on a white page.

Colour-blind eyes tell the first three names, the first grey and the phases apart; all others are told by symbol or label, too.
Names (runs, rows of a benchmark) are strong, phases light; dense exchanges and models are grey wherever they appear.
"""

INK = "#1e293b"
COLOURS = ("#1d4ed8", "#c2410c", "#86198f", "#0f766e", "#7f1d1d", "#4d7c0f", "#0369a1", "#be185d")
"""Of what commpress does, a colour a name."""
GREYS = ("#475569", "#7b8794")
"""Of what that is compared with."""
PHASES = {"encode": "#38bdf8", "wire": "#f59e0b", "decode": "#86efac", "exposed": "#881337"}
SPANS = {"forward": "#e2e8f0", "backward": "#b6c2d1", **PHASES}
"""Of a timeline."""
DENSE = "#94a3b8"
SMALL = "#155e75"
FRONT = "#3730a3"
