"""The colours of pictures and pages: what is kept, what is removed, and what stands behind."""

KEPT, REMOVED, PALE = "#2a6f97", "#c8553d", "#d9dee4"
