package bucket_test

import (
	"context"
	"fmt"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"
	"gocloud.dev/blob"

	"github.com/atoll-run/atoll/chunk"
	"github.com/atoll-run/atoll/chunk/bucket"
	"github.com/atoll-run/atoll/chunk/bucket/buckettest"
	"github.com/atoll-run/atoll/chunk/chunktest"
	"github.com/atoll-run/atoll/chunk/pack"
	"github.com/atoll-run/atoll/sandbox"
)

// s3 serves S3's protocol, as MinIO or Amazon do, and returns the URL of a fresh bucket.
func s3(t *testing.T) string {
	t.Helper()
	t.Setenv("AWS_ACCESS_KEY_ID", "test")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "test")
	backend := s3mem.New()
	srv := httptest.NewServer(gofakes3.New(backend).Server())
	t.Cleanup(srv.Close)
	if err := backend.CreateBucket("chunks"); err != nil {
		t.Fatal(err)
	}
	return "s3://chunks?region=us-east-1&use_path_style=true&endpoint=" + url.QueryEscape(srv.URL)
}

func folder(t *testing.T) string {
	t.Helper()
	return "file://" + t.TempDir() + "?metadata=skip"
}

// conformance: FR5.4
func TestBucketIsAStore(t *testing.T) {
	for name, make := range map[string]func(*testing.T) string{"file": folder, "s3": s3} {
		t.Run(name, func(t *testing.T) { suite(t, make) })
	}
}

// conformance: FR5.4
func TestAContainerOfAzureIsAStore(t *testing.T) {
	fresh := buckettest.Azure(t)
	suite(t, func(*testing.T) string { return fresh() })
}

// suite runs what every store passes on buckets; make returns the URL of a fresh one.
func suite(t *testing.T, make func(*testing.T) string) {
	plan := func(data []byte) pack.Plan {
		return pack.Choose(pack.Look(data), pack.Link{}, pack.CPU{Cores: 1})
	}
	chunktest.Run(t, func(t *testing.T) chunktest.Subject {
		where := make(t)
		return chunktest.Subject{
			Open: func(t *testing.T) chunk.Store {
				b, err := bucket.Open(context.Background(), where, bucket.Options{Plan: plan})
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = b.Close() })
				return b
			},
			Damage: func(t *testing.T, id chunk.ID) { flip(t, where, "chunks/"+id.String()[:2]+"/"+id.String()[2:]) },
			Later:  func() time.Time { return time.Now().Add(15 * 24 * time.Hour) },
		}
	})
}

// flip changes a bit of an object.
func flip(t *testing.T, where, key string) {
	t.Helper()
	ctx := context.Background()
	b, err := blob.OpenBucket(ctx, where)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	data, err := b.ReadAll(ctx, key)
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)/2] ^= 4
	if err := b.WriteAll(ctx, key, data, nil); err != nil {
		t.Fatal(err)
	}
}

// Two nodes share a bucket, and neither sees the other's leases.
func TestAChunkThatAnotherNodeReliesOnIsNotCollected(t *testing.T) {
	ctx, where := context.Background(), s3(t)
	now := time.Now()
	clock := func() time.Time { return now }
	var nodes [2]*chunk.Vault
	for i := range nodes {
		b, err := bucket.Open(ctx, where, bucket.Options{Now: clock, Fresh: time.Hour})
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		nodes[i] = chunk.NewVault(b)
	}
	data := []byte(fmt.Sprintf("%1000d", 7))
	id, err := nodes[0].Put(ctx, data) // and no ref: it was removed, say
	if err != nil {
		t.Fatal(err)
	}
	now = now.Add(59 * time.Minute)
	l := nodes[1].Lease()
	defer l.Release()
	if missing, err := l.Missing(ctx, []chunk.ID{id}); err != nil || len(missing) > 0 {
		t.Fatalf("%v, %v", missing, err)
	}
	now = now.Add(59 * time.Minute) // the second node takes its time to set its ref
	if done, err := nodes[0].Collect(ctx, now); err != nil || done.Removed > 0 {
		t.Fatalf("%+v, %v", done, err)
	}
	if missing, err := l.Missing(ctx, []chunk.ID{id}); err != nil || len(missing) != 1 {
		t.Fatalf("an old chunk is relied upon: %v", err)
	}
	now = now.Add(3 * time.Hour)
	if done, err := nodes[0].Collect(ctx, now); err != nil || done.Removed != 1 {
		t.Fatalf("%+v, %v", done, err)
	}
	_, err = nodes[1].Get(ctx, id)
	if !sandbox.Is(err, sandbox.NotFound) {
		t.Error(err)
	}
}

func TestOpenRefusesWhatIsNoBucket(t *testing.T) {
	for _, bad := range []string{"", "nothing", "ftp://x", "gs://x"} {
		if _, err := bucket.Open(context.Background(), bad, bucket.Options{}); !sandbox.Is(err, sandbox.Invalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	if _, err := bucket.Open(context.Background(), "file:///no/such/directory", bucket.Options{}); !strings.Contains(sandbox.HintOf(err), "make the directory") {
		t.Errorf("%v, %s", err, sandbox.HintOf(err))
	}
}

func TestAServerThatIsGoneIsUnavailable(t *testing.T) {
	t.Setenv("AWS_ACCESS_KEY_ID", "test")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "test")
	t.Setenv("AWS_MAX_ATTEMPTS", "1")
	b, err := bucket.Open(context.Background(), "s3://x?region=us-east-1&use_path_style=true&endpoint=http://127.0.0.1:1", bucket.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if _, err := b.Put(context.Background(), []byte("x")); !sandbox.Is(err, sandbox.Unavailable) {
		t.Error(err)
	}
}
