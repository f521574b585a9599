"""Run records → one self-contained page, and figures for a paper. Reading and drawing are apart.

reading   files of runs → `Report`      charts, losses, colors   numbers → bars, cells, lines   verdict   in words
page      a report → HTML               figures                  a report → SVG and PNG         pipeline  paths → files
"""
