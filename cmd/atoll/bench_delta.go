package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/atoll-run/atoll/image"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/transfer"
)

// deltaReport is what `atoll bench delta -o json` prints. Times are in seconds.
type deltaReport struct {
	Method    string  `json:"method"`
	Bytes     int64   `json:"bytes"`     // of the delta
	RawBytes  int64   `json:"raw_bytes"` // of the new image
	OldBytes  int64   `json:"old_bytes"`
	Ratio     float64 `json:"ratio"` // raw_bytes / bytes
	CPU       float64 `json:"cpu_s"` // of encoding, with indexing the old image
	Encode    float64 `json:"encode_s"`
	DecodeCPU float64 `json:"decode_cpu_s"`
	Decode    float64 `json:"decode_s"`
	Verified  bool    `json:"verified"` // decoded, and compared byte by byte
	Digest    string  `json:"digest"`   // of the new image

	Found     deltaFound `json:"found"`
	Predicted []forecast `json:"predicted"` // by rising time, from a sample
	Beside    []besides  `json:"beside"`
}

// deltaFound says where the bytes of the new image came from.
type deltaFound struct {
	Same       int64 `json:"same"`
	Zero       int64 `json:"zero"`
	Moved      int64 `json:"moved"`
	Earlier    int64 `json:"earlier"`
	Patched    int64 `json:"patched"` // elsewhere but for a few bytes
	Literal    int64 `json:"literal"`
	Dictionary int64 `json:"dictionary"`
}

// forecast is a transfer.Estimate.
type forecast struct {
	Method string  `json:"method"`
	Bytes  int64   `json:"bytes"`
	CPU    float64 `json:"cpu_s"`
	Time   float64 `json:"time_s"`
}

// besides is what another method makes of the same pair.
type besides struct {
	Name   string  `json:"name"`
	Bytes  int64   `json:"bytes"`
	CPU    float64 `json:"cpu_s"`
	Absent string  `json:"absent,omitempty"` // why it was not measured
}

// autoMethod leaves the method to the policy.
const autoMethod = "auto"

// deltaBench is one run of the benchmark.
type deltaBench struct {
	oldName, newName string
	old, next        transfer.Image
	dir              string // temporary
	method           string
	policy           transfer.Policy
	options          transfer.Options
	link             transfer.Link
	peers            bool
}

func (a *app) benchDeltaCommand() *cobra.Command {
	var f format
	var d deltaBench
	var bandwidth float64
	var thirty bool
	cmd := &cobra.Command{
		Use: "delta OLD NEW", Short: "Measure turning one file into another by a delta", Args: exact("OLD", "NEW"),
		Long: "Makes the delta by which who has OLD gets NEW (disks, memories, any files), decodes it, and compares the result\n" +
			"with NEW byte by byte. cpu_s is the processor time of encoding, with indexing OLD. Beside it stands what sending\n" +
			"all of NEW with zstd and sending changed blocks of 64 KB, packed as frames are, would take.",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.check(); err != nil {
				return err
			}
			switch {
			case !(bandwidth > 0) || math.IsInf(bandwidth, 1): // also no number at all
				return usageError("", "", "--bandwidth must be more than 0")
			case thirty && d.method != autoMethod:
				return usageError("", "", "--thirty-percent decides between methods: it goes with --method auto")
			case d.options.Random && d.method == transfer.Whole.String():
				return usageError("", "", "--random is of deltas: it does not go with --method whole")
			}
			d.link.Bandwidth = bandwidth * 1e6 / 8
			if thirty {
				d.policy = transfer.ThirtyPercent
			}
			d.oldName, d.newName = args[0], args[1]
			shown := a.bar("measuring")
			report, err := d.run(cmd.Context(), func(step string) { shown.report(image.Progress{Stage: step}) })
			shown.done()
			if err != nil {
				return deltaError(err)
			}
			if done, err := f.structured(a.stdout, report); done {
				return err
			}
			return printDelta(a.stdout, report)
		},
	}
	f.flags(cmd, "")
	cmd.Flags().StringVar(&d.method, "method", transfer.Delta.String(), "`how`: delta, dedup, whole, or auto to take the one predicted to be the fastest")
	cmd.Flags().BoolVar(&d.options.Random, "random", false, "make a delta that can be read anywhere without decoding the rest")
	cmd.Flags().IntVar(&d.options.Frame, "frame", 0, "how many `bytes` of literals are compressed together; default 4 MiB")
	cmd.Flags().Float64Var(&bandwidth, "bandwidth", 100, "of the link, in `Mbit/s`, for the prediction")
	cmd.Flags().BoolVar(&thirty, "thirty-percent", false, "with --method auto: send all when over 30 % changed, whatever that costs")
	cmd.Flags().BoolVar(&d.peers, "peers", false, "run rsync -z, zstd --patch-from, xdelta3, casync and restic too, as far as they are installed")
	return cmd
}

// deltaError gives errors of package transfer their kind.
func deltaError(err error) error {
	kind := sandbox.Kind("")
	switch {
	case errors.Is(err, os.ErrNotExist):
		kind = sandbox.NotFound
	case errors.Is(err, os.ErrPermission):
		kind = sandbox.Denied
	case errors.Is(err, transfer.ErrTooLarge), errors.Is(err, transfer.ErrOption):
		kind = sandbox.Invalid
	}
	return sandbox.E("atoll bench delta", kind, "", err)
}

func (d *deltaBench) run(ctx context.Context, step func(string)) (r deltaReport, err error) {
	for _, f := range []struct {
		name string
		to   *transfer.Image
	}{{d.oldName, &d.old}, {d.newName, &d.next}} {
		m, file, err := transfer.OpenImage(f.name)
		if err != nil {
			return r, err
		}
		defer file.Close()
		*f.to = m
	}
	if d.dir, err = os.MkdirTemp("", "atoll-bench-"); err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(d.dir)) }()

	step("index")
	r = deltaReport{RawBytes: d.next.Size, OldBytes: d.old.Size}
	begin := clock()
	index, err := transfer.BuildIndex(ctx, d.old)
	if err != nil {
		return r, err
	}
	indexing := begin.since()
	if err := d.choose(ctx, index, &r); err != nil {
		return r, err
	}
	if d.options.Method == transfer.Delta {
		d.options.Index = index
	} else {
		indexing = stopped{} // others index for themselves what they need
	}
	step("encode")
	if err := d.encode(ctx, indexing, &r); err != nil {
		return r, err
	}
	step("decode")
	if err := d.decode(ctx, &r); err != nil {
		return r, err
	}
	for _, other := range []struct {
		name string
		size func(context.Context) (int64, error)
	}{{"whole file, zstd -3", d.wholeSize}, {"64 KB blocks", d.blocksSize}} {
		step(other.name)
		begin := clock()
		n, err := other.size(ctx)
		if err != nil {
			return r, err
		}
		r.Beside = append(r.Beside, besides{Name: other.name, Bytes: n, CPU: begin.since().cpu})
	}
	if d.peers {
		for _, p := range deltaPeers {
			step(p.name)
			b, err := p.run(ctx, d)
			if err != nil {
				return r, err
			}
			r.Beside = append(r.Beside, b)
		}
	}
	return r, nil
}

// choose samples the pair, notes what is predicted, and sets the method.
func (d *deltaBench) choose(ctx context.Context, index *transfer.Index, r *deltaReport) (err error) {
	s, err := transfer.Sample(ctx, d.old, d.next, index)
	if err != nil {
		return err
	}
	s.Indexed = false // who asks without an index pays for one
	machine := transfer.DefaultMachine(runtime.GOMAXPROCS(0))
	for _, e := range transfer.Predict(s, d.link, machine) {
		r.Predicted = append(r.Predicted, forecast{e.Method.String(), e.Bytes, rounded(e.CPU), rounded(e.Time)})
	}
	if d.method == autoMethod {
		d.options.Method = d.policy.Choose(s, d.link, machine)
	} else if d.options.Method, err = transfer.ParseMethod(d.method); err != nil {
		return err
	}
	r.Method = d.options.Method.String()
	return nil
}

func (d *deltaBench) deltaFile() string { return filepath.Join(d.dir, "delta") }

// encode makes the delta. indexing is what was done for it before.
func (d *deltaBench) encode(ctx context.Context, indexing stopped, r *deltaReport) error {
	f, err := os.Create(d.deltaFile())
	if err != nil {
		return err
	}
	begin := clock()
	s, err := transfer.Encode(ctx, f, d.old, d.next, d.options)
	took := begin.since()
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	r.Bytes, r.Digest = s.Written, s.New.String()
	r.Ratio = math.Round(100*float64(r.RawBytes)/float64(r.Bytes)) / 100
	r.CPU, r.Encode = round(indexing.cpu+took.cpu), round(indexing.wall+took.wall)
	r.Found = deltaFound{s.Same, s.Zero, s.Moved, s.Earlier, s.Patched, s.Literal, s.Dictionary}
	return nil
}

// decode rebuilds the new file from the delta and compares the two.
func (d *deltaBench) decode(ctx context.Context, r *deltaReport) error {
	f, err := os.Open(d.deltaFile())
	if err != nil {
		return err
	}
	defer f.Close()
	path := filepath.Join(d.dir, "new")
	begin := clock()
	if _, err := transfer.DecodeFile(ctx, f, d.old, path, transfer.DecodeOptions{}); err != nil {
		return err
	}
	took := begin.since()
	r.DecodeCPU, r.Decode = round(took.cpu), round(took.wall)
	made, err := os.Open(path)
	if err != nil {
		return err
	}
	defer made.Close()
	if err := sameBytes(ctx, io.NewSectionReader(d.next.At, 0, d.next.Size), made); err != nil {
		return err
	}
	r.Verified = true
	return os.Remove(path)
}

// sameBytes fails unless both readers have the same bytes.
func sameBytes(ctx context.Context, a, b io.Reader) error {
	p, q := make([]byte, 1<<20), make([]byte, 1<<20)
	for ctx.Err() == nil {
		n, err := io.ReadFull(a, p)
		m, other := io.ReadFull(b, q)
		if !bytes.Equal(p[:n], q[:m]) {
			return sandbox.Errorf("atoll bench delta", sandbox.Internal, "", "the decoded file differs from the new one")
		}
		if err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				return nil // other has ended as well: as many bytes were read
			}
			return errors.Join(err, other)
		}
	}
	return ctx.Err()
}

// wholeSize is what the new file compresses to by itself.
func (d *deltaBench) wholeSize(ctx context.Context) (int64, error) {
	var n written
	enc, err := zstd.NewWriter(&n, zstd.WithEncoderLevel(zstd.EncoderLevelFromZstd(3)))
	if err != nil {
		return 0, err
	}
	from := io.NewSectionReader(d.next.At, 0, d.next.Size)
	for ctx.Err() == nil {
		if _, err = io.CopyN(enc, from, 16<<20); err != nil {
			break
		}
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return int64(n), errors.Join(err, enc.Close(), ctx.Err())
}

// blocksSize is what blocks of 64 KB that the old file does not have compress to.
func (d *deltaBench) blocksSize(ctx context.Context) (int64, error) {
	signature, err := transfer.NewSignature(ctx, d.old, transfer.DefaultBlock)
	if err != nil {
		return 0, err
	}
	s, err := transfer.EncodeBlocks(ctx, io.Discard, signature, d.next, transfer.Options{})
	return s.Written, err
}

// written counts the bytes that are written to it.
type written int64

func (w *written) Write(p []byte) (int, error) {
	*w += written(len(p))
	return len(p), nil
}

// started is when something began, in time and in processor time of this process.
type started struct {
	wall time.Time
	cpu  float64
}

// stopped is how long something took, in seconds.
type stopped struct{ wall, cpu float64 }

func clock() started { return started{time.Now(), processorTime(unix.RUSAGE_SELF)} }

func (s started) since() stopped {
	return stopped{time.Since(s.wall).Seconds(), round(processorTime(unix.RUSAGE_SELF) - s.cpu)}
}

// processorTime returns the seconds that this process, or the children it waited for, ran.
func processorTime(who int) float64 {
	var u unix.Rusage
	if unix.Getrusage(who, &u) != nil { // fails for an unknown who only
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()).Seconds()
}

func rounded(d time.Duration) float64 { return round(d.Seconds()) }
func round(seconds float64) float64   { return math.Round(seconds*1000) / 1000 }

func printDelta(w io.Writer, r deltaReport) error {
	mb := func(n int64) string { return fmt.Sprintf("%.3f MB", float64(n)/1e6) }
	fmt.Fprintf(w, "%s: %s for %s (1:%.1f); encoded in %.2f s, decoded in %.2f s, verified\n\n",
		r.Method, mb(r.Bytes), mb(r.RawBytes), r.Ratio, r.Encode, r.Decode)
	t := newTable(w)
	t.row("METHOD", "BYTES", "TIMES AS MANY", "CPU")
	t.row("atoll "+r.Method, fmt.Sprint(r.Bytes), "1.00", fmt.Sprintf("%.2f s", r.CPU))
	for _, b := range r.Beside {
		if b.Absent != "" {
			t.row(b.Name, "-", "-", b.Absent)
			continue
		}
		t.row(b.Name, fmt.Sprint(b.Bytes), fmt.Sprintf("%.2f", float64(b.Bytes)/float64(max(r.Bytes, 1))), fmt.Sprintf("%.2f s", b.CPU))
	}
	return t.flush()
}
