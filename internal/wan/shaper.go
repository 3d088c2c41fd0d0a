package wan

import (
	"math/rand/v2"
	"time"
)

// shaper decides what becomes of each packet of one direction. It has no clock, and is not safe for use by several goroutines.
type shaper struct {
	path Path
	dice *rand.Rand
	free time.Time // when the link will have sent all that was taken before
}

func newShaper(p Path) *shaper { return &shaper{path: p, dice: rand.New(rand.NewPCG(p.Seed, 1))} }

// send returns when a packet of size bytes that comes at now arrives, never before one that came earlier; ok is false for one
// that is lost. Which ones are lost by chance depends on their order alone: the dice are thrown for each.
func (s *shaper) send(now time.Time, size int) (arrives time.Time, ok bool) {
	lost := s.dice.Float64() < s.path.Loss
	if s.free.Before(now) {
		s.free = now
	}
	waiting := s.free.Sub(now).Seconds() * s.path.Rate / 8 // bytes
	if lost || waiting > float64(s.path.Queue) {
		return time.Time{}, false
	}
	s.free = s.free.Add(time.Duration(float64(size*8) / s.path.Rate * float64(time.Second)))
	return s.free.Add(s.path.Delay), true
}
