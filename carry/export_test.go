package carry

import "github.com/atoll-run/atoll/migrate"

// Break has steps of live moves fail: an error of fault is what comes of the step, with the outcome.
func (c *Carrier) Break(fault func(migrate.Step) (migrate.Outcome, error)) { c.fault = fault }
