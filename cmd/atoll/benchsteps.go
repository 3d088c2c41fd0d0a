package main

import (
	"context"
	"errors"
	"math"
	"time"

	"github.com/atoll-run/atoll/guest"
	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/runtime/microvm"
	"github.com/atoll-run/atoll/sandbox"
)

// firstOutput runs echo in a sandbox and returns when its output is here. What
// comes after that, which nobody waits for, is left to finish, to be awaited
// before something else is measured there.
func (m *bench) firstOutput(ctx context.Context, sb node.Sandbox) (finish func(), err error) {
	g := guestOf(m.b, sb)
	p, err := g.Start(ctx, guest.Command{Args: []string{"echo", "ready"}})
	if err != nil {
		g.CloseIdle()
		return nil, err
	}
	finish = func() {
		for ended := false; !ended; {
			_, err := p.Next()
			ended = err != nil
		}
		p.Close()
		g.CloseIdle()
	}
	for {
		e, err := p.Next()
		if err == nil && e.Kind == guest.End {
			err = sandbox.Errorf("atoll bench", sandbox.Internal, sb.Name, "echo ended without output: %s", e.Result.Status)
		}
		if err != nil {
			finish()
			return nil, err
		}
		if e.Kind == guest.Stdout {
			return finish, nil
		}
	}
}

// times measures n times from making a sandbox to its first output; removing
// it is not measured. between, which may be nil, comes before each.
func (m *bench) times(ctx context.Context, between func() error, create func() (node.Sandbox, error)) (*figure, error) {
	var times []time.Duration
	for range m.n {
		if between != nil {
			if err := between(); err != nil {
				return nil, err
			}
		}
		begin, end := time.Now(), time.Now().Add(poolPatient)
		sb, err := create()
		// What is made ahead of need may not be there yet; and none is made while
		// somebody asks all the time.
		for sandbox.Is(err, sandbox.Unavailable) && time.Now().Before(end) {
			if err := sleep(ctx, 300*time.Millisecond); err != nil {
				return nil, err
			}
			begin = time.Now()
			sb, err = create()
		}
		if err != nil {
			return nil, err
		}
		m.live[sb.ID] = true
		finish, err := m.firstOutput(ctx, sb)
		if err != nil {
			return nil, err
		}
		times = append(times, time.Since(begin))
		finish()
		if err := m.remove(ctx, sb.ID); err != nil {
			return nil, err
		}
	}
	return figureOf(times), nil
}

func (m *bench) create(ctx context.Context) (node.Sandbox, error) {
	req := m.req
	req.Fresh = true
	sb, err := m.b.Create(ctx, req)
	if err == nil {
		m.live[sb.ID] = true
	}
	return sb, err
}

func (m *bench) remove(ctx context.Context, id string) error {
	err := m.b.Remove(ctx, id)
	if err == nil || sandbox.Is(err, sandbox.NotFound) {
		delete(m.live, id)
		return nil
	}
	return err
}

// clear removes what is left, also after a failure or ctrl-c.
func (m *bench) clear(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeTimeout)
	defer cancel()
	var errs []error
	for id := range m.live {
		errs = append(errs, m.remove(ctx, id))
	}
	return errors.Join(errs...)
}

func (m *bench) cold(ctx context.Context, _ sandbox.Capabilities, r *benchReport) (err error) {
	if r.Runtime == microvm.Name {
		r.Cold, err = m.started(ctx, microvm.StartCold)
		return err
	}
	r.Cold, err = m.times(ctx, nil, func() (node.Sandbox, error) { return m.create(ctx) })
	return err
}

// started measures machines that come to be in one way. The first is not
// measured: it may have to wait for a template.
func (m *bench) started(ctx context.Context, how string) (*figure, error) {
	if sb, err := m.create(ctx); err != nil {
		return nil, err
	} else if err := m.remove(ctx, sb.ID); err != nil {
		return nil, err
	}
	req := m.req
	req.Fresh, req.Labels = true, map[string]string{microvm.LabelStart: how}
	return m.times(ctx, nil, func() (node.Sandbox, error) { return m.b.Create(ctx, req) })
}

func (m *bench) template(ctx context.Context, _ sandbox.Capabilities, r *benchReport) (err error) {
	if r.Runtime == microvm.Name {
		r.Template, err = m.started(ctx, microvm.StartTemplate)
	}
	return err
}

// spawned and ready need a daemon: only that makes machines ahead of need.
func (m *bench) spawned(ctx context.Context, _ sandbox.Capabilities, r *benchReport) (err error) {
	if r.Runtime == microvm.Name && r.Through == throughDaemon {
		r.Spawned, err = m.started(ctx, microvm.StartSpawned)
	}
	return err
}

func (m *bench) ready(ctx context.Context, _ sandbox.Capabilities, r *benchReport) (err error) {
	if r.Runtime == microvm.Name && r.Through == throughDaemon {
		r.Ready, err = m.started(ctx, microvm.StartPool)
	}
	return err
}

// sleep waits, unless ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (m *bench) exec(ctx context.Context, _ sandbox.Capabilities, r *benchReport) error {
	sb, err := m.create(ctx)
	if err != nil {
		return err
	}
	var times []time.Duration
	for range m.n {
		begin := time.Now()
		finish, err := m.firstOutput(ctx, sb)
		if err != nil {
			return err
		}
		times = append(times, time.Since(begin))
		finish()
	}
	r.Exec = figureOf(times)
	return m.remove(ctx, sb.ID)
}

func (m *bench) idle(ctx context.Context, _ sandbox.Capabilities, r *benchReport) error {
	var ids []string
	for range idleCount {
		sb, err := m.create(ctx)
		if err != nil {
			return err
		}
		ids = append(ids, sb.ID)
	}
	if err := sleep(ctx, idleSettle); err != nil {
		return err
	}
	var total int64
	for _, id := range ids {
		s, err := m.b.Stats(ctx, id)
		if err != nil {
			return err
		}
		total += s.Memory
		if err := m.remove(ctx, id); err != nil {
			return err
		}
	}
	r.IdleMB = math.Round(float64(total)/idleCount/1e5) / 10
	return nil
}

func (m *bench) restore(ctx context.Context, caps sandbox.Capabilities, r *benchReport) error {
	if !caps.Snapshot {
		return nil
	}
	sb, err := m.create(ctx)
	if err != nil {
		return err
	}
	snap, err := m.b.Snapshot(ctx, sb.ID, "")
	if err != nil {
		return err
	}
	if err := m.remove(ctx, sb.ID); err != nil {
		return err
	}
	r.Snapshot, err = m.times(ctx, nil, func() (node.Sandbox, error) { return m.b.Restore(ctx, snap.ID, node.CreateRequest{}) })
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeTimeout)
	defer cancel()
	return errors.Join(err, m.b.RemoveSnapshot(end, snap.ID))
}

func (m *bench) fork(ctx context.Context, caps sandbox.Capabilities, r *benchReport) error {
	if !caps.Snapshot {
		return nil
	}
	parent, err := m.create(ctx)
	if err != nil {
		return err
	}
	var times []time.Duration
	for range max(3, m.n/5) { // each makes ten sandboxes
		begin := time.Now()
		children, err := m.b.Fork(ctx, parent.ID, 10, node.CreateRequest{})
		if err != nil {
			return err
		}
		times = append(times, time.Since(begin))
		for _, c := range children {
			if c.Err != nil {
				return c.Err
			}
			m.live[c.Sandbox.ID] = true
		}
		for _, c := range children {
			if err := m.remove(ctx, c.Sandbox.ID); err != nil {
				return err
			}
		}
	}
	r.Fork10 = figureOf(times)
	return m.remove(ctx, parent.ID)
}

// pool measures claims from a warm pool, which only a template can have. Where
// demand makes none, one is asked for; what was there before gets its size back.
func (m *bench) pool(ctx context.Context, caps sandbox.Capabilities, r *benchReport) error {
	t, err := m.b.GetTemplate(ctx, m.req.Image)
	if err != nil || !caps.Snapshot {
		return nil
	}
	now := func() (mine, set node.Pool, err error) {
		pools, err := m.b.Pools(ctx)
		for _, p := range pools {
			switch {
			case p.Template == t.ID && p.Runtime == r.Runtime:
				mine = p
			case p.Template == t.ID:
				set = p
			}
		}
		return mine, set, err
	}
	sb, err := m.b.Create(ctx, m.req) // is demand, where that counts
	if err != nil {
		return err
	}
	if err := m.remove(ctx, sb.ID); err != nil {
		return err
	}
	before, other, err := now()
	if err != nil {
		return err
	}
	if before.Size == 0 && other.Size == 0 {
		if err := m.b.SetPool(ctx, t.ID, poolSize); err != nil {
			return err
		}
		defer func() {
			end, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeTimeout)
			defer cancel()
			_ = m.b.SetPool(end, t.ID, 0) // the measurements are what matters
		}()
	}
	if p, _, err := now(); err != nil || p.Size == 0 {
		return err // pools are of another runtime
	}
	full := func() error { // a pool being refilled would be measured along
		deadline := time.Now().Add(poolPatient)
		for {
			p, _, err := now()
			if err != nil {
				return err
			}
			if p.Ready > 0 && p.Ready >= p.Size {
				return nil
			}
			if time.Now().After(deadline) {
				return sandbox.Errorf("atoll bench", sandbox.Timeout, t.ID, "the pool is not filled after %s", poolPatient)
			}
			if err := sleep(ctx, 20*time.Millisecond); err != nil {
				return err
			}
		}
	}
	r.Pool, err = m.times(ctx, full, func() (node.Sandbox, error) { return m.b.Create(ctx, m.req) })
	return err
}
