"""Run records → one page that stands alone, and figures for a paper. Reading and drawing are apart."""
