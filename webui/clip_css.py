"""Looks of the clip editor, the takes and the evaluation's table."""

CLIP_CSS = """
#clips-player audio, .sound audio { width: 100%; height: 40px; }
#clips-player .hint { font-size: 0.85rem; margin: 4px 0; }
.takes { display: flex; flex-direction: column; gap: 10px; }
.take { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 8px 12px; }
.take .said { font-size: 1.1rem; margin: 0; overflow-wrap: anywhere; }
.take .meta { font-size: 0.85rem; margin: 2px 0 6px; overflow-wrap: anywhere; }
.sounds { display: flex; flex-wrap: wrap; gap: 10px; }
.sound { flex: 1 1 240px; min-width: 0; }
.sound span { display: block; font-size: 0.85rem; overflow-wrap: anywhere; }
.downloads { display: flex; flex-wrap: wrap; gap: 8px; }
a.download { color: var(--body-text-color) !important; text-decoration: underline; }
.downloads a { padding: 4px 10px; border: 1px solid var(--border-color-primary); border-radius: 8px; }
#clips-table .lines { max-height: 360px; overflow: auto; border: 1px solid var(--border-color-primary); }
#clips-table table { width: 100%; border-collapse: collapse; border: 0 !important; }
#clips-table th { position: sticky; top: 0; background: var(--background-fill-secondary); text-align: left; }
#clips-table th, #clips-table td { padding: 6px 10px; border: 0 solid var(--border-color-primary) !important; }
#clips-table td { border-bottom-width: 1px !important; }
#clips-table tbody tr { cursor: pointer; }
#clips-table tbody tr:hover, #clips-table tr.now { background: var(--background-fill-secondary); }
#clips-table tr.now { font-weight: 600; box-shadow: inset 4px 0 var(--color-accent); }
#clips-table td:last-child { width: 65%; overflow-wrap: anywhere; }
@media (max-width: 600px) { #clips-table th, #clips-table td { padding: 6px 4px; } }
svg.wave { width: 100%; height: 72px; cursor: crosshair; background: var(--background-fill-secondary); }
svg.wave path { stroke: var(--color-accent); stroke-width: 2.5; fill: none; }
svg.wave line { stroke-width: 3; stroke: var(--body-text-color); }
svg.wave line.cut { stroke: #dc2626; }
#clips-text textarea, #record-sentence textarea { font-size: 1.15rem; line-height: 1.6; }
.clips-pages, .clips-buttons { flex-wrap: wrap; align-items: center; }
.clips-pages > * { flex: 0 0 auto !important; width: auto !important; margin: 0 !important; }
.clips-pages > .form, #clips-page { flex: 0 0 80px !important; min-width: 80px !important; width: 80px !important; }
"""
