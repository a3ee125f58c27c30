"""What a run did, for people: curves, tables, and where every second went.

`history.load` reads a run directory, `page.write_report` makes the HTML page and the picture,
`tables` has the talk's two tables. Nothing here needs torch or MPI.
"""
