// Package timeout is the time limits of connections that wait on a condition variable.
package timeout

import (
	"sync"
	"time"
)

// Limit is a time limit on reading or writing; the zero value is none. The mutex of the condition variable guards it.
type Limit struct {
	at    time.Time
	timer *time.Timer // wakes those who wait; nil when there is none
}

// Passed reports whether the time is up.
func (l *Limit) Passed() bool { return !l.at.IsZero() && !time.Now().Before(l.at) }

// Set moves the limit, and wakes those who wait on c now and when the time is up. c's mutex is held.
func (l *Limit) Set(at time.Time, c *sync.Cond) {
	if l.timer != nil {
		l.timer.Stop()
		l.timer = nil
	}
	l.at = at
	if wait := time.Until(at); !at.IsZero() && wait > 0 {
		l.timer = time.AfterFunc(wait, func() {
			c.L.Lock()
			defer c.L.Unlock()
			c.Broadcast()
		})
	}
	c.Broadcast()
}
