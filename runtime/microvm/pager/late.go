package pager

import (
	"errors"
	"os"
	"time"

	"github.com/atoll-run/atoll/arrive"
)

// ErrLost says that a part of a file that was on its way did not come.
var ErrLost = errors.New("a part of it did not come from the node that has it")

const (
	// lateTimeout bounds how long a part is waited for: whoever brings it has a bound of its own, and is less patient.
	lateTimeout = 3 * time.Minute
	lateLook    = 2 * time.Millisecond   // between looks
	lateAsk     = 250 * time.Millisecond // between requests for the same part
)

// late is how a file that is on its way is asked for.
type late struct {
	name  string
	wants *os.File
}

// ask says that the chunk with a number is needed; ahead: that nobody waits for it yet.
func (l *late) ask(index int64, ahead bool) {
	arrive.Ask(l.wants, arrive.Want{File: l.name, Offset: index * chunkSize, Ahead: ahead})
}

// await calls read until it does not fail because the chunk is not there, or there is no hope.
func (l *late) await(index int64, ahead bool, read func() error) error {
	for began, asked := time.Now(), (time.Time{}); ; time.Sleep(lateLook) {
		err := read()
		switch {
		case err == nil || !errors.Is(err, ErrDamaged):
			return err
		case errors.Is(err, errShort), time.Since(began) > lateTimeout:
			return ErrLost
		}
		if time.Since(asked) > lateAsk {
			l.ask(index, ahead)
			asked = time.Now()
		}
	}
}

// announce asks for all that a plan needs at once, so that it comes in its order and not one by one.
func (m *memory) announce(plan []uint32) {
	last := make(map[uint64]bool) // chunks that were asked for
	for _, page := range plan {
		if !m.has(page) {
			continue
		}
		at := m.where[page]
		c := m.layers[at>>56-1]
		key := at &^ (chunkSize - 1)
		if c.late == nil || last[key] {
			continue
		}
		last[key] = true
		c.late.ask(int64(at&(1<<56-1))/chunkSize, true)
	}
}
