package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"
)

// moveState names the descriptor that a move goes by. A machine has one at a time.
const moveState = "move-state"

// moveDowntime is how long QEMU, when it asks itself whether it can stop the
// machine and send the rest, may think that this takes, in milliseconds. What it
// knows is the rate at which the sender reads, so it is far less in truth. A machine
// that changes more than can be sent may stand still for longer: twice as long each
// moveRelents, moveRelentsTimes times.
const (
	moveDowntime     = 30
	moveRelents      = 5 * time.Second
	moveRelentsTimes = 7
)

// capabilities switches features of moving on.
func capabilities(names ...string) map[string]any {
	var list []map[string]any
	for _, name := range names {
		list = append(list, map[string]any{"capability": name, "state": true})
	}
	return map[string]any{"capabilities": list}
}

// step is one call of QMP.
type step struct {
	command string
	args    map[string]any
	file    *os.File // travels along; nil: none
}

func (m *machine) steps(ctx context.Context, steps ...step) error {
	for _, s := range steps {
		var fds []int
		if s.file != nil {
			fds = append(fds, int(s.file.Fd()))
		}
		var args any // a map that is nil would be sent as null
		if s.args != nil {
			args = s.args
		}
		if err := m.qmp.call(ctx, s.command, args, nil, fds...); err != nil {
			return err
		}
	}
	return nil
}

// Receive makes a machine that waits take in another.
func (m *machine) Receive(ctx context.Context, state *os.File) error {
	err := m.steps(ctx,
		step{command: "stop"}, // it does not run by itself when it has arrived
		// The layer of its disk that it will write is read only when it runs.
		step{command: "migrate-set-capabilities", args: capabilities("events", "late-block-activate")},
		step{"getfd", map[string]any{"fdname": moveState}, state},
		step{command: "migrate-incoming", args: map[string]any{"uri": "fd:" + moveState}})
	if err != nil {
		return m.explain("make ready for a machine", err)
	}
	return nil
}

// Received waits until the machine has arrived whole.
func (m *machine) Received(ctx context.Context) error {
	if err := m.await(ctx, 0, migrated("completed")); err != nil {
		return m.explain("take in a machine", err)
	}
	return nil
}

// Send sends the machine away. QEMU gives up its disks, with all of their layers
// written, before it ends the stream.
func (m *machine) Send(ctx context.Context, state *os.File) (stopped time.Time, err error) {
	since := m.mark()
	err = m.steps(ctx,
		step{command: "migrate-set-capabilities", args: capabilities("events")},
		step{command: "migrate-set-parameters", args: map[string]any{"max-bandwidth": 0, "downtime-limit": moveDowntime}},
		step{"getfd", map[string]any{"fdname": moveState}, state},
		step{command: "migrate", args: map[string]any{"uri": "fd:" + moveState}})
	ctx, cancel := context.WithTimeout(ctx, sendTimeout)
	defer cancel()
	go m.relent(ctx)
	if err == nil {
		// Once it is completed nothing but we lets the machine go on.
		err = m.await(ctx, since, func(e event) (bool, error) {
			if e.Name == "STOP" {
				stopped = e.At
			}
			return migrated("completed")(e)
		})
	}
	if err != nil {
		return stopped, errors.Join(m.explain("send the machine", err), m.Stay(context.WithoutCancel(ctx)))
	}
	return stopped, nil
}

// sendTimeout bounds how long a machine may be on its way.
const sendTimeout = 15 * time.Minute

// relent lets QEMU stop a machine for longer the longer its move takes.
func (m *machine) relent(ctx context.Context) {
	for limit, n := moveDowntime, 0; n < moveRelentsTimes; n++ {
		select {
		case <-ctx.Done():
			return
		case <-time.After(moveRelents):
		}
		limit *= 2
		if m.steps(ctx, step{command: "migrate-set-parameters", args: map[string]any{"downtime-limit": limit}}) != nil {
			return // it has arrived, or failed, and whoever waits for that is told
		}
	}
}

// stayPause is how often QEMU is asked whether it has given up, stayTimeout how long.
const (
	stayPause   = 2 * time.Millisecond
	stayTimeout = 10 * time.Second
)

// Stay ends a move: the machine goes on here.
func (m *machine) Stay(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, stayTimeout)
	defer cancel()
	if err := m.steps(ctx, step{command: "migrate_cancel"}); err != nil {
		return err
	}
	for {
		var move struct {
			Status string `json:"status"` // empty: there was none
		}
		if err := m.qmp.call(ctx, "query-migrate", nil, &move); err != nil {
			return err
		}
		if slices.Contains([]string{"", "none", "completed", "failed", "cancelled"}, move.Status) {
			return m.Resume(ctx)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(stayPause):
		}
	}
}

// migrated tells the event that a move has got to a state, or failed.
func migrated(state string) func(event) (bool, error) {
	return func(e event) (bool, error) {
		var data struct {
			Status string `json:"status"`
		}
		if e.Name != "MIGRATION" || json.Unmarshal(e.Data, &data) != nil {
			return false, nil
		}
		switch data.Status {
		case "failed", "cancelled":
			return false, fmt.Errorf("the move has %s", data.Status)
		}
		return data.Status == state, nil
	}
}
