package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"
)

// A rival runs one model. Times are in seconds.
type rival interface {
	// threads sets how many compute; it comes first.
	threads(n int) error
	// prefill reads n tokens of a new text, decode writes n more.
	prefill(n int) (float64, error)
	decode(n int) (float64, error)
	// many writes n tokens of each of batch new texts.
	many(n int) (float64, error)
	// loaded returns how long loading took, and the bytes of memory that are in use then.
	loaded() (float64, int64)
	close() error
}

// The engines, by their places.
const (
	atoll = iota
	llama
	llamaHuge
	engines
)

var engineNames = [engines]string{"Atoll", "llama.cpp", "llama.cpp, huge pages"}

// batch is how many texts are written together.
const batch = 8

// A cell is what was measured of one model with one number of threads: medians of tokens a second.
type cell struct {
	model   string
	threads int
	bytes   int64   // of weights that a token reads
	limit   float64 // bytes a second that memory can be read with
	rounds  int

	prefill, decode [engines]float64 // 0: not measured
	many            [engines]float64 // of all texts together
	loaded          [engines]float64 // beside a load on all CPUs: decode
	took            [engines]float64 // seconds of loading
	memory          [engines]int64
}

// samples are the turns of a cell.
type samples struct {
	prefill, decode, many [engines][]float64
	limit                 []float64
}

// subject is a model file to measure.
type subject struct {
	name, file string
	bytes      int64
}

// measure compares all engines on one model.
func (b *bench) measure(ctx context.Context, s subject) (err error) {
	room := b.prompt + b.answer*(b.rounds+2)*4
	var list []rival
	defer func() {
		for _, e := range list {
			err = errors.Join(err, e.close())
		}
	}()
	ours, err := openOurs(ctx, s.file, room+batch*b.answer*2)
	if err != nil {
		return err
	}
	list = append(list, ours)
	for _, huge := range []bool{false, true} {
		if b.llama == nil {
			break
		}
		p, err := b.llama.open(ctx, s.file, room, huge)
		if err != nil {
			return fmt.Errorf("llama.cpp with %s: %w", s.name, err)
		}
		list = append(list, p)
	}
	for _, n := range b.threads {
		for _, e := range list {
			if err := e.threads(n); err != nil {
				return err
			}
		}
		c := cell{model: s.name, threads: n, bytes: s.bytes}
		if err := b.turns(ctx, &c, list); err != nil {
			return err
		}
		if err := b.beside(ctx, &c, list); err != nil {
			return err
		}
		for i, e := range list {
			c.took[i], c.memory[i] = e.loaded()
		}
		b.cells = append(b.cells, c)
		fmt.Print(c.line(engineNames[atoll], atoll), c.line(engineNames[llama], llama), c.line(engineNames[llamaHuge], llamaHuge))
	}
	return nil
}

// late reports whether the cells so far took more than their part of the time for all.
func (b *bench) late() bool {
	all := len(b.threads) * (len(b.types) + 1)
	return time.Since(b.began) > b.total*time.Duration(len(b.cells)+1)/time.Duration(all)
}

// turns lets the engines take turns until the time for a cell is over. A short turn before warms up and does not count.
func (b *bench) turns(ctx context.Context, c *cell, list []rival) error {
	var s samples
	for i, e := range list {
		n := 32
		if i == llamaHuge {
			n = b.prompt // and stays there, since pages make no difference to prompts
		}
		_, err := e.prefill(n)
		if err == nil {
			_, err = e.decode(4)
		}
		if err != nil {
			return err
		}
	}
	end := time.Now().Add(b.budget)
	for c.rounds < b.rounds && (c.rounds < 1 || c.rounds < 2 && !b.late() || time.Now().Before(end)) {
		var turn samples
		for i, e := range list {
			if err := ctx.Err(); err != nil {
				return err
			}
			if i != llamaHuge {
				t, err := e.prefill(b.prompt)
				if err != nil {
					return err
				}
				turn.prefill[i] = append(turn.prefill[i], float64(b.prompt)/t)
			}
		}
		for range 2 {
			turn.limit = append(turn.limit, b.mem.sweep(c.threads))
			for i, e := range list {
				t, err := e.decode(b.answer)
				if err != nil {
					return err
				}
				turn.decode[i] = append(turn.decode[i], float64(b.answer)/t)
			}
		}
		for i, e := range list {
			if i == llama { // as with huge pages, to which it is not worse
				continue
			}
			t, err := e.many(b.answer / 2)
			if err != nil {
				return err
			}
			turn.many[i] = append(turn.many[i], float64(batch*(b.answer/2))/t)
		}
		s.add(&turn)
		c.rounds++
	}
	c.limit = median(s.limit)
	for i := range list {
		c.prefill[i], c.decode[i], c.many[i] = median(s.prefill[i]), median(s.decode[i]), median(s.many[i])
	}
	return nil
}

func (s *samples) add(t *samples) {
	for i := range s.decode {
		s.prefill[i], s.decode[i] = append(s.prefill[i], t.prefill[i]...), append(s.decode[i], t.decode[i]...)
		s.many[i] = append(s.many[i], t.many[i]...)
	}
	s.limit = append(s.limit, t.limit...)
}

// beside measures writing while every CPU has other work, for the types of b.beside.
func (b *bench) beside(ctx context.Context, c *cell, list []rival) error {
	if !slices.Contains(b.loaded, c.model) || c.threads != slices.Max(b.threads) {
		return nil
	}
	work, err := compete(ctx)
	if err != nil {
		return err
	}
	var speeds [engines][]float64
	for range 3 {
		for i, e := range list {
			t, err := e.decode(b.answer / 2)
			if err != nil {
				return errors.Join(err, work())
			}
			speeds[i] = append(speeds[i], float64(b.answer/2)/t)
		}
	}
	for i := range list {
		c.loaded[i] = median(speeds[i])
	}
	return work()
}

// compete starts a process for every CPU that computes without end.
func compete(ctx context.Context) (stop func() error, err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, self, "-spin")
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	time.Sleep(100 * time.Millisecond) // until it is under way
	return func() error {
		if err := cmd.Process.Kill(); err != nil {
			return err
		}
		_ = cmd.Wait() // it says that it was killed
		return nil
	}, nil
}

func median(x []float64) float64 {
	if len(x) == 0 {
		return 0
	}
	slices.Sort(x)
	return (x[(len(x)-1)/2] + x[len(x)/2]) / 2
}

// residentBytes is the memory of a process, 0 being this one; 0 when it cannot be told.
func residentBytes(pid int) int64 {
	name := "/proc/self/status"
	if pid > 0 {
		name = fmt.Sprintf("/proc/%d/status", pid)
	}
	raw, err := os.ReadFile(name)
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(raw)) {
		var kb int64
		if _, err := fmt.Sscanf(line, "VmRSS: %d kB", &kb); err == nil {
			return kb << 10
		}
	}
	return 0
}
