-- Two tables to try pgtide on: 1,000 users and 500 books, the same rows every time.
-- Plain SQL without psql's commands, so that any client can send it in one piece.

CREATE TABLE users (
    id serial PRIMARY KEY,
    name text NOT NULL,
    email text,
    age int,
    created_at timestamptz NOT NULL DEFAULT now(),
    bio text
);

CREATE TABLE books (
    id serial PRIMARY KEY,
    title text NOT NULL,
    author text,
    price numeric(10,2),
    published date,
    in_stock boolean NOT NULL DEFAULT true
);

INSERT INTO users (name, email, age, created_at, bio)
SELECT
    first || ' ' || last,
    -- One in 20 has told no address.
    CASE WHEN n % 20 <> 0 THEN lower(first) || '.' || lower(last) || n || '@example.com' END,
    18 + n * 7 % 63,
    timestamptz '2024-01-01 00:00:00+00' + n * interval '37 minutes',
    CASE WHEN n % 10 <> 0 THEN 'Reads ' || genre || ', writes ' || hobby || '.' END
FROM generate_series(1, 1000) AS n
CROSS JOIN LATERAL (
    SELECT
        (ARRAY['Ada', 'Grace', 'Alan', 'Edsger', 'Barbara', 'Donald', 'Margaret', 'Dennis', 'Frances', 'Niklaus'])[1 + n % 10] AS first,
        (ARRAY['Lovelace', 'Hopper', 'Turing', 'Dijkstra', 'Liskov', 'Knuth', 'Hamilton', 'Ritchie', 'Allen', 'Wirth', 'Perlis'])[1 + n % 11] AS last,
        (ARRAY['mysteries', 'poetry', 'history', 'travel stories', 'science fiction', 'cookbooks', 'biographies'])[1 + n % 7] AS genre,
        (ARRAY['letters', 'code', 'lyrics', 'reviews', 'short stories'])[1 + n % 5] AS hobby
) AS words
ORDER BY n;

INSERT INTO books (title, author, price, published, in_stock)
SELECT
    'The ' || adjective || ' ' || noun || ', volume ' || 1 + n / 120,
    author,
    4.99 + n * 13 % 4500 / 100.0,
    date '1950-01-01' + n * 53,
    n % 9 <> 0
FROM generate_series(1, 500) AS n
CROSS JOIN LATERAL (
    SELECT
        (ARRAY['Silent', 'Hidden', 'Last', 'Distant', 'Broken', 'Golden', 'Patient', 'Wandering'])[1 + n % 8] AS adjective,
        (ARRAY['River', 'Archive', 'Harbour', 'Mountain', 'Ledger', 'Garden', 'Tide', 'Library', 'Signal', 'Machine', 'Island', 'Atlas', 'Lantern', 'Orchard', 'Compass'])[1 + n % 15] AS noun,
        (ARRAY['Ursula Green', 'Tomas Hale', 'Ines Moreau', 'Kofi Mensah', 'Yuki Tanaka', 'Elif Demir', 'Olga Petrova'])[1 + n % 7] AS author
) AS words
ORDER BY n;
