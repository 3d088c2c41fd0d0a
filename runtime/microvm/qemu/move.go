package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"
)

// Names that a move gives to things inside QEMU. A machine has one at a time.
const (
	moveState  = "move-state" // descriptors
	moveDisk   = "move-disk"
	moveTarget = "move-target" // the node, in the source, of the target's disk
	moveJob    = "move"
)

// moveDowntime is how long QEMU, when it asks itself whether it can stop the
// machine and send the rest, may think that this takes, in milliseconds. What it
// knows is the rate at which the sender reads, so it is far less in truth.
const moveDowntime = 30

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
func (m *machine) Receive(ctx context.Context, disk int, state, listener *os.File) error {
	layers, err := m.layers(ctx, disk)
	if err == nil {
		err = m.steps(ctx,
			step{command: "stop"}, // it does not run by itself when it has arrived
			step{command: "migrate-set-capabilities", args: capabilities("events")},
			step{"getfd", map[string]any{"fdname": moveDisk}, listener},
			step{command: "nbd-server-start", args: map[string]any{"addr": map[string]any{"type": "fd", "data": map[string]any{"str": moveDisk}}}},
			step{command: "block-export-add", args: map[string]any{
				"type": "nbd", "id": moveDisk, "name": moveDisk, "node-name": layerName(disk, layers[len(layers)-1]), "writable": true,
			}},
			step{"getfd", map[string]any{"fdname": moveState}, state},
			step{command: "migrate-incoming", args: map[string]any{"uri": "fd:" + moveState}})
	}
	if err != nil {
		return m.explain("make ready for a machine", err)
	}
	return nil
}

// Received waits until the machine has arrived whole and closes its disk to others.
func (m *machine) Received(ctx context.Context) error {
	err := m.await(ctx, 0, migrated("completed"))
	if err == nil {
		err = m.steps(ctx, step{command: "nbd-server-stop"})
	}
	if err != nil {
		return m.explain("take in a machine", err)
	}
	return nil
}

// Send sends the machine away.
func (m *machine) Send(ctx context.Context, disk int, state, target *os.File) (stopped time.Time, err error) {
	since := m.mark()
	if err = m.mirror(ctx, disk, target, since); err == nil {
		stopped, err = m.sendState(ctx, state, since)
	}
	if err == nil {
		err = m.await(ctx, since, migrated("completed"))
	}
	if err != nil {
		return stopped, errors.Join(m.explain("send the machine", err), m.stay())
	}
	return stopped, nil
}

// mirror copies the uppermost layer of a disk to the target's, and from then on
// writes to both.
func (m *machine) mirror(ctx context.Context, disk int, target *os.File, since int) error {
	layers, err := m.layers(ctx, disk)
	if err != nil {
		return err
	}
	err = m.steps(ctx,
		step{"getfd", map[string]any{"fdname": moveDisk}, target},
		step{command: "blockdev-add", args: map[string]any{
			"driver": "nbd", "node-name": moveTarget, "export": moveDisk, "server": map[string]any{"type": "fd", "str": moveDisk},
		}},
		step{command: "blockdev-mirror", args: map[string]any{
			"job-id": moveJob, "device": layerName(disk, layers[len(layers)-1]), "target": moveTarget, "sync": "top", "copy-mode": "write-blocking",
		}})
	if err != nil {
		return err
	}
	return m.await(ctx, since, func(e event) (bool, error) {
		if _, err := jobEnded(e, moveJob); err != nil {
			return false, err
		}
		return e.Name == "BLOCK_JOB_READY", nil
	})
}

// sendState sends memory and devices. Between the last of the memory, when the
// machine stands still, and the devices the disks part.
func (m *machine) sendState(ctx context.Context, state *os.File, since int) (stopped time.Time, err error) {
	err = m.steps(ctx,
		step{command: "migrate-set-capabilities", args: capabilities("events", "pause-before-switchover")},
		step{command: "migrate-set-parameters", args: map[string]any{"max-bandwidth": 0, "downtime-limit": moveDowntime}},
		step{"getfd", map[string]any{"fdname": moveState}, state},
		step{command: "migrate", args: map[string]any{"uri": "fd:" + moveState}})
	if err == nil {
		err = m.await(ctx, since, func(e event) (bool, error) {
			if ok, err := migrated("pre-switchover")(e); ok || err != nil {
				return ok, err
			}
			if e.Name == "STOP" {
				stopped = time.Now()
			}
			return false, nil
		})
	}
	if err == nil {
		err = m.steps(ctx, step{command: "block-job-cancel", args: map[string]any{"device": moveJob}})
	}
	if err == nil {
		err = m.await(ctx, since, func(e event) (bool, error) { return jobEnded(e, moveJob) })
	}
	if err == nil {
		err = m.steps(ctx, step{command: "migrate-continue", args: map[string]any{"state": "pre-switchover"}})
	}
	return stopped, err
}

// stay ends a move that failed: the machine goes on here, alone with its disk.
// What is not under way cannot be ended, which is no error.
func (m *machine) stay() error {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	since := m.mark()
	var refused *qmpError
	for _, s := range []step{
		{command: "migrate_cancel"},
		{command: "block-job-cancel", args: map[string]any{"device": moveJob, "force": true}},
	} {
		err := m.steps(ctx, s)
		if err != nil && !errors.As(err, &refused) {
			return err
		}
		if err == nil && s.command == "block-job-cancel" {
			err := m.await(ctx, since, func(e event) (bool, error) {
				ended, err := jobEnded(e, moveJob)
				return ended || err != nil, nil
			})
			if err != nil {
				return err
			}
		}
	}
	if err := m.steps(ctx, step{command: "blockdev-del", args: map[string]any{"node-name": moveTarget}}); err != nil && !errors.As(err, &refused) {
		return err
	}
	return m.Resume(ctx)
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
