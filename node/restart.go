package node

import (
	"context"
	"errors"
	"time"

	"github.com/atoll-run/atoll/sandbox"
)

const (
	// maxRestarts is how often in a row a sandbox that is lost is made anew.
	maxRestarts = 5
	// restartForgiven is how long a sandbox must have run for its restarts to be forgotten.
	restartForgiven = 10 * time.Minute
)

// restarted drafts the record of a sandbox that was lost and asked to be made
// anew; it reports false when it did not ask, or is lost again and again.
func restarted(rec Sandbox, now time.Time) (Sandbox, bool) {
	if !rec.Lifecycle.Restart || rec.hidden() || rec.State != sandbox.Running {
		return rec, false
	}
	if now.Sub(rec.StartedAt) >= restartForgiven {
		rec.Restarts = 0
	}
	if rec.Restarts >= maxRestarts {
		return rec, false
	}
	rec.Restarts++
	rec.State, rec.Reason, rec.StartedAt = sandbox.Creating, "", now
	rec.Spec.Link, rec.Main = nil, nil
	return rec, true
}

// restart makes a lost sandbox's machine anew, under its name and ID: from the
// snapshot that it came from while there is one, else from its root. What it
// wrote since is gone. Its remains have been removed, and e.op is held.
func (n *Node) restart(ctx context.Context, e *entry, rec Sandbox, reason string) error {
	snap := rec.Parent
	if _, err := n.cfg.Snapshots.Get(snap); err != nil {
		snap = ""
	}
	err := n.start(ctx, e, &rec, source{snap: snap})
	if err == nil {
		rec.State = sandbox.Running
		err = n.save(ctx, e, rec)
	}
	if err != nil { // it stays lost
		clean, stop := context.WithTimeout(context.WithoutCancel(ctx), removeTimeout)
		defer stop()
		return errors.Join(err, n.demolish(clean, rec))
	}
	n.emit(sandbox.Event{Sandbox: rec.ID, Kind: sandbox.EventHealth, State: rec.State, Reason: "made anew: " + reason})
	return nil
}
