"""Tables, figures and the HTML report, all from the ledger."""
