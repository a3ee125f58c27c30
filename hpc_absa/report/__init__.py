"""What a run did: figures, tables, an HTML page, and where every second went.

`history.load` reads a run directory, `page.write_report` writes the page and an image, `tables` has
the tables of the talk. Nothing here needs torch or MPI.
"""
